"""What is installed is found without importing it, and QEFF_PROXY_PLUGINS chooses."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from qeff_proxy.errors import PluginError, UsageError
from qeff_proxy.plugins.entry_points import PackageEntry
from qeff_proxy.plugins.manager import PluginReport, Plugins

PLUGIN = """
    from qeff_proxy.hookspecs import hookimpl
    from qeff_proxy.sites import Site

    @hookimpl
    def locate_embedding():
        return Site(__name__)
"""


def claims(plugins, package):
    return [family for family in plugins.families() if family.distribution == package]


def report_on(plugins, package) -> PluginReport:
    (report,) = [report for report in plugins.reports() if report.distribution == package]
    return report


def test_a_family_is_a_model_type_and_where_its_plugin_lies(site_packages):
    site_packages.install("Acme.Models", {"rnn": "acme.rnn:plugin"}, version="3.2")

    assert claims(Plugins.discover({}), "Acme.Models") == [
        PackageEntry("rnn", "Acme.Models", "3.2", "acme.rnn:plugin")
    ]


def test_finding_families_imports_no_plugin(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": "raise SystemExit('imported')"})
    code = (
        "import sys; from qeff_proxy.plugins import Plugins; plugins = Plugins.discover({});"
        "print('rnn' in [family.name for family in plugins.families()]);"
        "plugins.reports(); plugins.generic_report();"
        "print(sorted({'acme_rnn', 'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(site_packages.folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["True", "[]"]


def test_using_one_family_does_not_import_another(site_packages):
    site_packages.install("acme", {"one": "acme_one"}, {"acme_one": PLUGIN})
    site_packages.install("brand", {"two": "brand_two"}, {"brand_two": PLUGIN})

    owner = Plugins.discover({}).owner("one")

    assert owner is not None
    assert (owner.name, owner.distribution, owner.version) == ("acme_one", "acme", "1.0")
    assert owner.hooks == ("locate_embedding",)
    assert "acme_one" in sys.modules
    assert "brand_two" not in sys.modules


def test_a_model_type_nobody_claims_has_no_owner(site_packages):
    assert Plugins.discover({}).owner("unheard-of") is None


@pytest.fixture
def tasks(site_packages):
    """``acme`` serves a model type, ``brand`` the same for one task alone."""
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": PLUGIN})
    site_packages.install("brand", {"rnn/encoder": "brand_rnn"}, {"brand_rnn": PLUGIN})
    return Plugins.discover({})


def served_by(plugins, model_type, task):
    return plugins.hooks_for(model_type, task=task, generic=types.SimpleNamespace()).distribution


def test_a_claim_on_one_task_comes_before_the_claim_on_the_model_type(tasks):
    assert served_by(tasks, "rnn", "encoder") == "brand"


def test_a_claim_on_one_task_concerns_no_other_task(tasks):
    assert served_by(tasks, "rnn", "causal-lm") == "acme"
    assert served_by(tasks, "rnn", None) == "acme"
    assert served_by(tasks, "cnn", "causal-lm") == "qeff-proxy"


def test_a_claim_on_a_task_comes_after_all_claims_on_a_model_type(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": PLUGIN})
    site_packages.install("brand", {"*/sing": "brand_any"}, {"brand_any": PLUGIN})
    assert served_by(Plugins.discover({}), "rnn", "sing") == "acme"
    assert served_by(Plugins.discover({}), "cnn", "sing") == "brand"
    assert served_by(Plugins.discover({}), "cnn", None) == "qeff-proxy"


def test_of_two_installations_of_a_package_the_importable_one_counts(site_packages, tmp_path):
    site_packages.install("acme", {"new": "acme_new"}, version="2.0")
    shadowed = type(site_packages)(tmp_path / "later")
    shadowed.install("acme", {"old": "acme_old"}, version="1.0")
    sys.path.append(str(shadowed.folder))
    try:
        found = claims(Plugins.discover({}), "acme")
    finally:
        sys.path.remove(str(shadowed.folder))
    assert [(family.name, family.version) for family in found] == [("new", "2.0")]


# Rivals


@pytest.fixture
def rivals(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn", "own": "acme_rnn"}, {"acme_rnn": PLUGIN})
    site_packages.install("brand", {"rnn": "brand_rnn"}, {"brand_rnn": PLUGIN}, version="2.0")
    return site_packages


def test_rivals_are_an_error_that_names_both_and_says_how_to_choose(rivals):
    with pytest.raises(PluginError) as caught:
        Plugins.discover({}).owner("rnn")
    message = str(caught.value)
    assert "'acme' 1.0 and 'brand' 2.0" in message
    assert "'rnn'" in message
    assert "QEFF_PROXY_PLUGINS=rnn=acme or QEFF_PROXY_PLUGINS=rnn=brand" in message
    assert not {"acme_rnn", "brand_rnn"} & set(sys.modules)


def test_rivals_do_not_keep_each_other_from_their_other_families(rivals):
    assert Plugins.discover({}).owner("own").distribution == "acme"


def test_rivals_are_reported_with_how_to_choose(rivals):
    report = report_on(Plugins.discover({}), "brand")
    assert report.state == "rival"
    assert "QEFF_PROXY_PLUGINS=rnn=brand" in report.reason


@pytest.mark.parametrize(
    "value", ["rnn=brand", "rnn = Brand", "-acme", "-acme,brand", "brand", "acme, rnn=brand"]
)
def test_the_environment_chooses_between_rivals(rivals, value):
    owner = Plugins.discover({"QEFF_PROXY_PLUGINS": value}).owner("rnn")
    assert owner.distribution == "brand"


def test_a_package_that_claims_a_model_type_twice_is_an_error_that_names_it(site_packages):
    site_packages.install_metadata("acme", b"[qeff_proxy.families]\nrnn = acme_a\nrnn = acme_b\n")
    with pytest.raises(PluginError, match=r"'acme' claims model type 'rnn' twice.*acme_a.*acme_b"):
        Plugins.discover({}).owner("rnn")


# Selection


@pytest.mark.parametrize(
    ("value", "served"),
    [
        ("", {"rnn", "ssm"}),
        (" , ", {"rnn", "ssm"}),
        ("acme", {"rnn"}),
        ("acme,brand", {"rnn", "ssm"}),
        ("-acme", {"ssm"}),
        ("-acme,-brand", set()),
        ("rnn=generic", {"ssm"}),
        ("generic", set()),
        ("generic,ssm=brand", {"ssm"}),
    ],
)
def test_the_environment_selects_packages(site_packages, value, served):
    site_packages.install("acme", {"rnn": "acme_rnn"})
    site_packages.install("brand", {"ssm": "brand_ssm"})
    plugins = Plugins.discover({"QEFF_PROXY_PLUGINS": value})
    found = {family.name for family in plugins.families()}
    assert found & {"rnn", "ssm"} == served


def test_what_is_not_selected_is_never_imported_and_says_so(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": PLUGIN})
    plugins = Plugins.discover({"QEFF_PROXY_PLUGINS": "-acme"})
    plugins.check()
    report = report_on(plugins, "acme")
    assert (report.state, report.hooks) == ("disabled", None)
    assert report.reason == "not selected by QEFF_PROXY_PLUGINS"
    assert plugins.owner("rnn") is None
    assert "acme_rnn" not in sys.modules


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("acmee", "'acmee', which is not installed"),
        ("-acmee", "'acmee', which is not installed"),
        ("rnn=acmee", "'acmee', which is not installed"),
        ("ssm=acme", "'ssm', which no package claims"),
        ("own=brand", "chooses 'brand' for 'own', which it does not claim"),
        ("rnn=acme,rnn=brand", "chooses two packages for 'rnn'"),
        ("acme,-acme", "disables 'acme', which is also asked for"),
        ("rnn=acme,-acme", "disables 'acme', which is also asked for"),
        ("-generic", "disables 'generic', which cannot be switched off"),
    ],
)
def test_a_selection_that_cannot_be_right_names_what_is_known(rivals, value, problem):
    with pytest.raises(UsageError) as caught:
        Plugins.discover({"QEFF_PROXY_PLUGINS": value})
    assert problem in str(caught.value)
    assert "QEFF_PROXY_PLUGINS" in str(caught.value)
    assert "Known here: " in str(caught.value)


# Damaged installations


def test_a_damaged_package_is_reported_and_hides_no_other(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"})
    site_packages.install_metadata("damaged", b"[qeff_proxy.families]\nno equals sign\n")
    plugins = Plugins.discover({})
    report = report_on(plugins, "damaged")
    assert report.state == "failed"
    assert "entry points cannot be read" in report.reason
    assert len(claims(plugins, "acme")) == 1


def test_a_package_without_metadata_is_reported_by_its_folder(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"})
    info = site_packages.install_metadata("nameless", b"[qeff_proxy.families]\nssm = nameless\n")
    (info / "METADATA").unlink()
    plugins = Plugins.discover({})
    report = report_on(plugins, None)
    assert report.state == "failed"
    assert str(site_packages.folder) in report.reason
    assert len(claims(plugins, "acme")) == 1


def test_a_damaged_package_of_no_concern_is_passed_over(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"})
    site_packages.install_metadata("stranger", b"[console_scripts]\n\xff\xfe = nothing\n")
    plugins = Plugins.discover({})
    assert len(claims(plugins, "acme")) == 1
    assert not plugins.broken
