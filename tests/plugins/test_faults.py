"""A plugin that cannot be used is named with its reason, and harms nobody else."""

from __future__ import annotations

import json
import re

import pytest
from qeff_proxy.cli import main
from qeff_proxy.errors import PluginError
from qeff_proxy.plugins.manager import Plugins

GOOD = """
    from qeff_proxy.hookspecs import hookimpl

    @hookimpl
    def locate_embedding(model, config):
        return None
"""

# what is wrong -> (source of the module, what the reason must say)
FAULTS = {
    "a missing dependency": ("import no_such_dependency", r"ModuleNotFoundError: .*no_such_dep"),
    "a syntax error": ("def locate_embedding(:", r"SyntaxError: .*line 1"),
    "an error of its own": ("raise LookupError('no licence')", r"LookupError: no licence"),
    "leaving the interpreter": ("raise SystemExit('bye')", r"SystemExit: bye"),
    "an exception that no one expects": (
        "class Stop(BaseException): ...\nraise Stop('here')",
        r"Stop: here",
    ),
    "no hook": ("def locate_embedding(model): ...", r"has no hook; .*qeff_proxy\.hookimpl"),
    "another project's marker": (
        """
        import pluggy

        @pluggy.HookimplMarker("pytest")
        def locate_embedding(model): ...
        """,
        r"has no hook",
    ),
    "a misspelled hook": (
        GOOD.replace("locate_embedding", "locate_embeding"),
        r"no hook 'locate_embeding'; did you mean 'locate_embedding'\?",
    ),
    "a misspelled hook beside a right one": (
        GOOD
        + """
    @hookimpl
    def local_lm_head(model): ...
        """,
        r"no hook 'local_lm_head'; did you mean 'locate_lm_head'\?",
    ),
    "a misspelled specname": (
        GOOD.replace("@hookimpl", "@hookimpl(specname='preproces')"),
        r"no hook 'preproces'; did you mean 'preprocess'\?",
    ),
    "a hook that is nothing like one": (
        GOOD.replace("locate_embedding", "zzz"),
        r"no hook 'zzz'; hooks are .*build_proxy.*preprocess",
    ),
    "an argument the hook does not have": (
        GOOD.replace("(model, config)", "(model, tokenizer)"),
        r"locate_embedding\(model, tokenizer\).*'tokenizer'.*\(version 1 of the hooks",
    ),
    "a newer version of the hooks": (
        GOOD + "\n    qeff_proxy_api = 99\n",
        r"version 99 of the hooks, and this qeff-proxy has version 1; install a newer qeff-proxy",
    ),
    "an older version of the hooks": (
        GOOD + "\n    qeff_proxy_api = 0\n",
        r"version 0 of the hooks, .* version 1; install a newer release of the plugin",
    ),
}


@pytest.fixture(params=FAULTS.items(), ids=FAULTS.keys())
def fault(request, site_packages):
    """A faulty package ``acme`` (model type ``rnn``) beside a good one; what its reason says."""
    _, (source, reason) = request.param
    site_packages.install("acme", {"rnn": "acme_faulty"}, {"acme_faulty": source})
    site_packages.install("brand", {"ssm": "brand_good"}, {"brand_good": GOOD})
    return reason


def test_a_faulty_plugin_is_reported_with_its_reason(fault):
    reports = {report.plugin: report for report in Plugins.discover({}).check()}
    faulty = reports["acme_faulty"]
    assert (faulty.state, faulty.distribution, faulty.model_types) == ("failed", "acme", ("rnn",))
    assert re.search(fault, faulty.reason)
    assert "\n" not in faulty.reason


def test_a_faulty_plugin_harms_no_other(fault):
    plugins = Plugins.discover({})
    reports = {report.plugin: report for report in plugins.check()}
    assert reports["brand_good"].state == "ok"
    assert plugins.owner("ssm").distribution == "brand"


def test_using_a_faulty_plugin_names_it_its_package_and_the_reason(fault):
    plugins = Plugins.discover({})
    for _ in range(2):  # the second time the module may be half in sys.modules
        with pytest.raises(PluginError, match=fault) as caught:
            plugins.hooks_for("rnn")
        message = str(caught.value)
        assert "plugin 'acme_faulty' of package 'acme'" in message
        assert "QEFF_PROXY_PLUGINS=rnn=generic" in message


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("acme_good:nothing", "AttributeError: .*'nothing'"),
        ("acme_good:Plugin", "it is a class; name an instance of it"),
        ("acme_good:broken", "RuntimeError: not ready"),
        ("not a module", "ValueError: .*not a module"),
    ],
)
def test_an_entry_point_that_names_no_plugin_is_reported(site_packages, value, reason):
    source = """
        from qeff_proxy.hookspecs import hookimpl

        class Plugin:
            @hookimpl
            def locate_embedding(self, model): ...

        class Broken:
            @property
            def qeff_proxy_api(self):
                raise RuntimeError("not ready")

        broken = Broken()
    """
    site_packages.install("acme", {"rnn": value}, {"acme_good": source})
    with pytest.raises(PluginError, match=reason):
        Plugins.discover({}).owner("rnn")


def test_an_object_serves_as_a_plugin(site_packages):
    source = """
        from qeff_proxy.hookspecs import hookimpl

        class Plugin:
            @hookimpl
            def locate_embedding(self, model): ...

        plugin = Plugin()
    """
    site_packages.install("acme", {"rnn": "acme_object:plugin"}, {"acme_object": source})
    owner = Plugins.discover({}).owner("rnn")
    assert (owner.name, owner.hooks) == ("acme_object:plugin", ("locate_embedding",))


def test_a_plugin_of_this_version_of_the_hooks_may_say_so(site_packages):
    site_packages.install(
        "acme", {"rnn": "acme_rnn"}, {"acme_rnn": GOOD + "\n    qeff_proxy_api = 1\n"}
    )
    assert Plugins.discover({}).owner("rnn") is not None


@pytest.mark.parametrize("command", [("plugins", "--check"), ("backends", "acme")])
def test_ctrl_c_says_whose_code_was_imported(command, site_packages, monkeypatch, capsys):
    groups = (
        b"[qeff_proxy.families]\nrnn = acme_hangs\n[qeff_proxy.backends]\nacme = acme_hangs:B\n"
    )
    site_packages.install_metadata("acme", groups)
    # A module that hangs, and a user who stops it.
    (site_packages.folder / "acme_hangs.py").write_text("raise KeyboardInterrupt")
    monkeypatch.setenv("QEFF_PROXY_PLUGINS", "acme")
    assert main([*command]) == 130
    assert "interrupted while acme_hangs" in (said := capsys.readouterr().err)
    assert "of package acme was imported" in said


@pytest.mark.parametrize("claim", ["*/*", "*", "rnn/", "/task", "rnn/*"])
def test_a_claim_that_serves_nothing_is_said(claim, site_packages, capsys, monkeypatch):
    site_packages.install("acme", {claim: "acme_good"}, {"acme_good": GOOD})
    monkeypatch.setenv("QEFF_PROXY_PLUGINS", "acme")
    (report,) = [r for r in Plugins.discover().reports() if r.distribution == "acme"]
    assert report.state == "failed"
    assert report.reason.startswith(f"{claim} claims nothing")


def test_what_a_listing_prints_does_not_spoil_the_json(site_packages, capsys):
    groups = (
        b"[qeff_proxy.backends]\nacme = acme_b:B\n[qeff_proxy.backend_listings]\nacme = acme_l:L\n"
    )
    site_packages.install_metadata("acme", groups)
    (site_packages.folder / "acme_l.py").write_text("print('hello')")
    assert main(["backends", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "acme" in {backend["name"] for backend in json.loads(out)["backends"]}
    assert err == "hello\n"
