"""Flows and adapters of other packages: loaded by name, and none harms another.

Families, backends and demos are found by the same functions; their own tests are beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from qeff_proxy.errors import PluginError, UsageError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.transformers_model import remote_code_adapter

LOADERS = {"flows": load_flow, "remote_code": remote_code_adapter}
SOURCE = """
class Flow: ...

def refuse():
    from qeff_proxy.errors import UsageError
    raise UsageError("no licence", "Buy one.")

def stop():
    raise SystemExit(3)
"""


@pytest.fixture(params=LOADERS)
def group(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(group: str) -> Callable[[str], Any]:
    return LOADERS[group]


def install(site_packages: Any, group: str, package: str, entry: str) -> None:
    site_packages.install_metadata(package, f"[qeff_proxy.{group}]\n{entry}\n".encode())


def test_an_entry_is_loaded_beside_a_damaged_package(
    group: str, load: Callable[[str], Any], site_packages: Any
) -> None:
    site_packages.install("modules", {}, {"acme_flow": SOURCE})
    install(site_packages, group, "acme", "spoken = acme_flow:Flow")
    install(site_packages, group, "damaged", "no equals sign")
    loaded = load("spoken")
    kind = loaded if isinstance(loaded, type) else type(loaded)
    assert (kind.__module__, kind.__name__) == ("acme_flow", "Flow")


def test_two_packages_with_one_name_are_an_error_that_names_both(
    group: str, load: Callable[[str], Any], site_packages: Any
) -> None:
    install(site_packages, group, "acme", "spoken = acme_flow:Flow")
    install(site_packages, group, "brand", "spoken = brand_flow:Flow")
    with pytest.raises(PluginError, match=r"packages acme and brand both have a.* 'spoken'"):
        load("spoken")


def test_a_package_with_one_name_twice_is_an_error_that_names_it(
    group: str, load: Callable[[str], Any], site_packages: Any
) -> None:
    install(site_packages, group, "acme", "spoken = acme_flow:Flow\nspoken = acme_flow:Other")
    with pytest.raises(PluginError, match=r"package acme has two entries for the .*'spoken'"):
        load("spoken")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("acme_no_module:Flow", "ModuleNotFoundError: No module named 'acme_no_module'"),
        ("acme_flow:nothing", "AttributeError: .*'nothing'"),
    ],
)
def test_an_entry_that_cannot_be_imported_names_package_and_reason(
    value: str, reason: str, group: str, load: Callable[[str], Any], site_packages: Any
) -> None:
    site_packages.install("modules", {}, {"acme_flow": SOURCE})
    install(site_packages, group, "acme", f"spoken = {value}")
    message = f"'spoken' of package acme cannot be used: {value} raised {reason}"
    with pytest.raises(PluginError, match=message):
        load("spoken")


def test_an_error_that_a_package_raises_on_purpose_passes_unchanged(site_packages: Any) -> None:
    site_packages.install("modules", {}, {"acme_flow": SOURCE})
    install(site_packages, "flows", "acme", "spoken = acme_flow:refuse\nsung = acme_flow:stop")
    with pytest.raises(UsageError, match=r"no licence\. Buy one\."):
        load_flow("spoken")
    with pytest.raises(PluginError, match=r"'sung' of package acme cannot .*SystemExit: 3"):
        load_flow("sung")


def test_an_unknown_flow_lists_the_known_ones_and_the_damaged_packages(site_packages: Any) -> None:
    install(site_packages, "flows", "acme", "spoken = acme_flow:Flow")
    install(site_packages, "flows", "damaged", "no equals sign")
    with pytest.raises(PluginError, match="there is no flow 'sung'") as caught:
        load_flow("sung")
    assert "causal-lm" in str(caught.value)
    assert "spoken" in str(caught.value)
    assert "Package damaged: its entry points cannot be read" in str(caught.value)


def test_a_model_type_without_an_adapter_has_none(site_packages: Any) -> None:
    install(site_packages, "remote_code", "acme", "spoken = acme_flow:Flow")
    assert remote_code_adapter("sung") is None
