"""All targets, those of the vendors' plugin too, whether or not its package is installed."""

from __future__ import annotations

import pkgutil
import tomllib
from pathlib import Path
from typing import Any

from qeff_proxy.device.target import BUILTIN_TARGETS, GROUP, Target

ROOT = Path(__file__).parents[2]
VENDORS = tomllib.loads((ROOT / "plugins" / "npu" / "pyproject.toml").read_text("utf-8"))
CLASSES = {**BUILTIN_TARGETS, **VENDORS["project"]["entry-points"][GROUP]}


def make_target(name: str, **options: Any) -> Target:
    """The target of this name; AI Hub's needs h5py, which the tests' environment has."""
    target: Target = pkgutil.resolve_name(CLASSES[name])(**options)
    assert target.name == name
    return target
