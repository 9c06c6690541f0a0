"""Options of the ``onnxruntime`` backend, and the settings of the runtime that they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnxruntime

from qeff_proxy.backends.backend import usable_cores
from qeff_proxy.compile_options import CompileOptions

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_BRIEFLY = "briefly"
#: Waking a thread takes longer than most operators of a decode step. A thread that waits this long
#: before it sleeps is ready for the next product, and keeps a core from others for no longer.
_BRIEFLY_US = 20
#: The options that say how weights are stored.
WEIGHT_NAMES = ("weights", "head_weights")
_BITS = {"int8": 8, "int4": 4}
_KEEP = "keep"
_BLOCKS = (16, 32, 64, 128, 256)

OPTIONS: dict[str, str] = {
    "optimization": "graph optimization level: none, basic, extended or all (default)",
    "save_optimized": "write the optimized graphs, so that opening is quick (default: true)",
    "in_place": "write a decoder's cache in place, where its graph allows it (default: true)",
    "spinning": "how long threads wait busily between operators: briefly (default), true: "
    "as long as ONNX Runtime lets them, which is slow where anything else runs, false: never",
    "weights": "what matrix products keep their weights in: float (default: as exported), int8, "
    "int4, or keep: the codes in an export made with --weights keep",
    "head_weights": "the same for the LM head (default: float)",
    "block_size": f"weights that share a scale: {', '.join(map(str, _BLOCKS))} (default: 32)",
    "activations": "what products with such weights are computed in: int8 (default) or float, "
    "which loses less; with int8 weights it is slow",
    "recipe": "the file of a recipe: modules whose weights stay float (--recipe)",
}
#: See `qeff_proxy.backends.backend.Backend.values`.
VALUES: dict[str, Any] = {
    "optimization": tuple(_LEVELS),
    "save_optimized": bool,
    "in_place": bool,
    "spinning": (_BRIEFLY, True, False),
    **dict.fromkeys(WEIGHT_NAMES, ("float", *_BITS, _KEEP)),
    "block_size": _BLOCKS,
    "activations": ("int8", "float"),
    "recipe": str,
}
#: See `qeff_proxy.backends.backend.Backend.precisions`.
PRECISIONS: dict[str, dict[str, str]] = {kind: {"weights": kind} for kind in _BITS}


def runtime_settings(options: CompileOptions) -> onnxruntime.SessionOptions:
    """ONNX Runtime's settings: how far graphs are optimized, and how threads work and wait."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = _LEVELS[options.backend.get("optimization", "all")]
    spinning = options.backend.get("spinning", _BRIEFLY)
    if spinning is False:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif spinning == _BRIEFLY:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(_BRIEFLY_US))
    else:
        # Parts run in turn, each with its own threads: those of a part that has run must not keep
        # the cores from the next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    cores = usable_cores(options)
    if cores is not None:
        settings.intra_op_num_threads = cores
    return settings


@dataclass(frozen=True)
class WeightOptions:
    """How the weights of one part are stored.

    Attributes:
        bits: 8 or 4; ``None``: as exported.
        block_size: Weights that share a scale.
        integer_products: Whether activations are quantized to 8 bits during the run.
        keep: Whether the codes in the export are used.
    """

    bits: int | None = None
    block_size: int = 32
    integer_products: bool = True
    keep: bool = False

    @property
    def replaces(self) -> bool:
        """Whether weights are not used as they are exported."""
        return self.bits is not None or self.keep

    @classmethod
    def of(cls, part: str, options: Mapping[str, Any]) -> WeightOptions:
        """Read a part's options, which are among `VALUES`."""
        kind = options.get("head_weights" if part == "lm_head" else "weights", "float")
        keep = kind == _KEEP
        # Kept weights are those that the model was published with: rounding is asked for.
        integers = options.get("activations", "float" if keep else "int8") == "int8"
        return cls(_BITS.get(kind), int(options.get("block_size", 32)), integers, keep)
