"""A backend in a package of its own, as an installer would leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GOOD = """
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend

print("a backend that prints while it is imported")


class Acme(OnnxRuntimeBackend):
    options = {"speed": "how fast (default: fast)"}

    def versions(self):
        return {"acme": "7.1"}

    def devices(self):
        return ["ACME-1 (the small one)"]
"""


def install(
    folder: Path, package: str, backends: Mapping[str, str], modules: Mapping[str, str]
) -> None:
    """Install a package with these entry points and modules into a folder on the path."""
    lines = "".join(f"{name} = {value}\n" for name, value in backends.items())
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qeff_proxy.backends]\n{lines}")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
