"""What QEfficient's scripts ask for that has another place here, or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from qeff_proxy.errors import UsageError

__all__ = ["ELSEWHERE", "HARDWARE_OPTIONS", "only_runtime", "without_runtime"]

#: Arguments of QEfficient's ``compile`` that only mean something on its hardware. They are
#: handed to backends that have such an option and otherwise ignored.
HARDWARE_OPTIONS = frozenset(
    {
        "aic_enable_depth_first",
        "mdp_ts_num_devices",
        "mos",
        "mxfp6_matmul",
        "mxint8_kv_cache",
        "num_devices",
        "num_speculative_tokens",
        "full_batch_size",
        "kv_cache_batch_size",
        "num_patches",
        "img_size",
    }
)
#: QEfficient's options for where and how its hardware runs a model.
_RUNTIME_OPTIONS = frozenset({"device_id", "device_ids", "runtime_ai100"})
#: Options of QEfficient's ``from_pretrained``, and what does the same here.
ELSEWHERE = {
    "attn_implementation": "Leave it out: models are traced with eager attention.",
    "config": "Save the model with that config, and name its folder.",
    "continuous_batching": "Leave it out: rows of a batch begin and end together.",
    "num_hidden_layers": "Export the first layers with export(num_layers=…).",
    "qaic_config": "Leave it out: options of a backend go to compile.",
}


def without_runtime(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without QEfficient's for its own hardware, which are warned of."""
    for name in sorted(_RUNTIME_OPTIONS & set(settings)):
        if settings[name] is not None:
            warnings.warn(
                f"{name} is for QEfficient's hardware and is ignored; the backend was chosen when "
                "the model was compiled",
                UserWarning,
                stacklevel=3,
            )
    return {name: value for name, value in settings.items() if name not in _RUNTIME_OPTIONS}


def only_runtime(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a run that takes none but those, which are ignored.

    Raises:
        UsageError: There is another.
    """
    left = without_runtime(settings)
    if left:
        raise UsageError(f"generate takes no {min(left)}", "Leave it out, or see its arguments.")
