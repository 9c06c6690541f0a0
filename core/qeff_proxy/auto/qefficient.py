"""Arguments in QEfficient's scripts that belong elsewhere here, or have no counterpart."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from qeff_proxy.errors import UsageError

#: Arguments of QEfficient's ``compile`` for its own hardware. Backends that have such an option get
#: them; the others ignore them, with a warning unless the value is the default, which is here.
HARDWARE_OPTIONS: dict[str, Any] = {
    "aic_enable_depth_first": False,
    "mdp_ts_num_devices": 1,
    "mos": -1,
    "mxfp6_matmul": False,
    "mxint8_kv_cache": False,
    "num_devices": 1,
    "num_speculative_tokens": None,
    "full_batch_size": None,
    "kv_cache_batch_size": None,
    "num_patches": 1,  # of one tile, as QEfficient's examples have it
    "img_size": None,
}
#: QEfficient's options for the device and the runtime of its hardware.
_RUNTIME_OPTIONS = frozenset({"device_id", "device_ids", "runtime_ai100"})
#: Options of QEfficient's ``from_pretrained``, and their counterparts here.
ELSEWHERE = {
    "attn_implementation": "Leave it out: models are traced with eager attention.",
    "config": "Save the model with that config, and name its folder.",
    "continuous_batching": "Leave it out: rows of a batch begin and end together.",
    "num_hidden_layers": "Export the first layers with export(num_layers=…).",
    "qaic_config": "Leave it out: options of a backend go to compile.",
}


def without_hardware(
    options: Mapping[str, Any], backend: str, understood: Collection[str]
) -> dict[str, Any]:
    """Drop QEfficient's compile options for its own hardware, with a warning for each.

    Args:
        options: The options of the backend.
        backend: Its name.
        understood: The options it has; these are kept.
    """
    unknown = (HARDWARE_OPTIONS.keys() & options.keys()) - set(understood)
    for name in sorted(unknown):
        value, default = options[name], HARDWARE_OPTIONS[name]
        if value is not None and (value != default or type(value) is not type(default)):
            warnings.warn(
                f"{name} means nothing to backend {backend!r} and is ignored; it is for "
                "QEfficient's hardware: backend='qaic'",
                UserWarning,
                stacklevel=3,
            )
    return {name: value for name, value in options.items() if name not in unknown}


def without_runtime(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drop QEfficient's settings for its own hardware, with a warning for each."""
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
    """Refuse all settings but QEfficient's for its own hardware, which are ignored.

    Raises:
        UsageError: There is another setting.
    """
    others = without_runtime(settings)
    if others:
        raise UsageError(f"generate takes no {min(others)}", "Leave it out, or see its arguments.")
