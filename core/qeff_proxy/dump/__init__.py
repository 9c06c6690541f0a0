"""Dumps: every tensor of a run on disk, as ``.npy`` files with a manifest.

The format is specified in ``docs/dump-format.md``. Nothing here needs torch or transformers.
"""

from __future__ import annotations

from qeff_proxy.dump.format import TensorName
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.dump.reader import Dump, StoredTensor, read_dump
from qeff_proxy.dump.rules import RULES, BrokenRuleError
from qeff_proxy.dump.selection import DumpOptions
from qeff_proxy.dump.writer import DumpWriter

__all__ = [
    "RULES",
    "BrokenRuleError",
    "Dump",
    "DumpOptions",
    "DumpWriter",
    "StepInfo",
    "StoredTensor",
    "TensorName",
    "read_dump",
]
