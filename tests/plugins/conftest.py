"""Installed plugin packages: folders on the path with real metadata and real modules."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class SitePackages:
    """A folder that Python imports from, as an installer would leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        package: str,
        families: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        version: str = "1.0",
    ) -> None:
        """Install a package whose entry points are ``families`` and that has ``modules``."""
        lines = "".join(f"{model_type} = {value}\n" for model_type, value in families.items())
        self.install_metadata(package, f"[qeff_proxy.families]\n{lines}".encode(), version)
        for name, source in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")

    def install_metadata(self, package: str, entry_points: bytes, version: str = "1.0") -> Path:
        """Install metadata alone."""
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_bytes(entry_points)
        return info


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    """A place for packages, taken off the path again together with what was imported from it."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("QEFF_PROXY_PLUGINS", raising=False)
    yield SitePackages(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and folder in Path(file).parents:
            del sys.modules[name]
