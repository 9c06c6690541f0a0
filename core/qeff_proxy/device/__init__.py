"""A device in a lab: pack a dump's inputs for its tools, and read what they wrote."""

from __future__ import annotations

from qeff_proxy.device.conventions import Conventions
from qeff_proxy.device.import_recorded import import_recorded
from qeff_proxy.device.pack_dump import PackOptions, pack_dump
from qeff_proxy.device.target import Target, load_target
from qeff_proxy.device.unpack_outputs import Unpacked, unpack_outputs

__all__ = [
    "Conventions",
    "PackOptions",
    "Target",
    "Unpacked",
    "import_recorded",
    "load_target",
    "pack_dump",
    "unpack_outputs",
]
