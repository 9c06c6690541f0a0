"""Backends of other packages: found by entry points, and none harms another."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from qeff_proxy.backends import registry
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.registry import check_backends, list_backends, load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.plugins import entry_points
from qeff_proxy.testing.backend_parts import feeds_of, make_export

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location(
    "backend_packages", Path(__file__).with_name("packages.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
packages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(packages)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name, module in list(sys.modules.items()):
        if folder in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture
def good(site: Path) -> Path:
    packages.install(site, "acme", {"acme": "acme_npu:Acme"}, {"acme_npu": packages.GOOD})
    return site


def state_of(name: str) -> tuple[str, str]:
    (report,) = [one for one in list_backends() if one.name == name]
    return report.state, report.reason


def test_a_package_brings_a_backend(good: Path, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export")
    compiled = compile_export(export, "acme", CompileOptions(backend={"speed": "slow"}))
    assert compiled.folder.name.startswith("acme-")
    with open_sessions(compiled) as sessions:
        found = sessions["embedding"].run(feeds_of(export.parts[0], query=2))
    assert found["inputs_embeds"].shape == (1, 2, 16)
    with pytest.raises(UsageError, match="no option 'sped'"):
        compile_export(export, "acme", CompileOptions(backend={"sped": 1}))


def test_it_is_listed_without_being_imported_and_checked_when_asked(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert state_of("acme") == ("listed", "")
    assert "acme_npu" not in sys.modules
    (report,) = check_backends(["acme"])
    assert (report.state, report.package, report.version) == ("ok", "acme", "1.0")
    assert dict(report.versions) == {"acme": "7.1"}
    assert report.devices == ("ACME-1 (the small one)",)
    assert report.options == {"speed": "how fast (default: fast)"}
    assert capsys.readouterr().out == ""  # where the JSON goes


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Acme: ...", "does not derive from qeff_proxy.backends.backend.Backend"),
        ("Acme = 5", "5 does not derive from qeff_proxy.backends.backend.Backend"),
        ("from qeff_proxy.backends import Backend\nclass Acme(Backend): ...", "compile, open"),
        ("", "has no attribute 'Acme'"),
        (
            packages.GOOD + "\n    def __init__(self):\n        raise OSError('no card')\n",
            "OSError: no card",
        ),
    ],
)
def test_a_broken_one_is_listed_with_its_reason_and_harms_no_other(
    source: str, reason: str, site: Path
) -> None:
    packages.install(site, "broken", {"broken": "broken_npu:Acme"}, {"broken_npu": source})
    packages.install(site, "acme", {"acme": "acme_npu:Acme"}, {"acme_npu": packages.GOOD})
    reports = {report.name: report for report in check_backends(["broken", "acme"])}
    assert reports["broken"].state == "failed"
    assert reason in reports["broken"].reason
    assert reports["acme"].state == "ok"
    with pytest.raises(BackendError, match="backend 'broken' of package broken cannot be used"):
        load_backend("broken")
    load_backend("onnxruntime")


def test_metadata_that_cannot_be_read_hides_no_other(good: Path) -> None:
    packages.install(good, "damaged", {}, {})
    (good / "damaged-1.0.dist-info" / "entry_points.txt").write_text(
        "[qeff_proxy.backends]\nno equals sign\n"
    )
    assert state_of("acme") == ("listed", "")
    (report,) = [one for one in list_backends() if one.package == "damaged"]
    assert (report.state, report.name) == ("failed", "")
    assert "cannot be read" in report.reason
    load_backend("acme")


def test_two_of_a_name_are_rivals_and_neither_is_guessed(good: Path) -> None:
    packages.install(good, "brand", {"acme": "brand_npu:Acme"}, {"brand_npu": packages.GOOD})
    rivals = [(one.package, one.state, one.reason) for one in list_backends() if one.name == "acme"]
    assert rivals == [
        ("acme", "rival", "brand has it, too"),
        ("brand", "rival", "acme has it, too"),
    ]
    with pytest.raises(BackendError, match="acme and brand both have a backend 'acme'"):
        load_backend("acme")


def test_the_names_of_ours_cannot_be_taken(site: Path) -> None:
    packages.install(site, "taker", {"torch": "taker_npu:Acme"}, {"taker_npu": packages.GOOD})
    states = [(one.package, one.state) for one in list_backends() if one.name == "torch"]
    assert states == [("torch", "listed"), ("taker", "rival")]
    assert type(load_backend("torch")).__name__ == "TorchBackend"


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "qeff_proxy_npu.openvino.backend", raising=False)
    with pytest.raises(BackendError, match=r"pip install 'qeff-proxy\[openvino\]'"):
        load_backend("openvino")
    with pytest.raises(BackendError, match=r"no backend 'opnvino'.*Known are .*openvino"):
        load_backend("opnvino")


@pytest.mark.parametrize("name", ["openvino", "qaic", "qnn"])
def test_a_backend_whose_package_is_not_installed_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_entries", lambda _group: ([], []))
    monkeypatch.setattr(entry_points, "find_entries", lambda _group: ([], []))
    for ask in (lambda: registry.load_backend(name), lambda: registry.check_backends([name])):
        with pytest.raises(BackendError, match=f"'{name}' is not installed") as caught:
            ask()
        assert f"qeff-proxy[{name}]" in caught.value.hint
    with pytest.raises(BackendError, match="no backend 'text'"):
        registry.load_backend("text")


def test_each_extra_for_a_backend_brings_its_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for name in ("openvino", "qaic", "qnn"):
        assert any(need.startswith("qeff-proxy-npu") for need in extras[name])
