"""The weights of a checkpoint by their names in it, whatever it stores them as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_files import GGUF_LINK, safetensors_files
from qeff_proxy.load.gguf_files import gguf_weights
from qeff_proxy.load.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from qeff_proxy.load.quantized.pieces import FP8
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.load.weight_sources import StoredWeight, Weight

#: ``quant_method`` in a config → what gives the weights that the codes stand for.
FORMATS = {
    "awq": awq.weights_of,
    "bitsandbytes": bitsandbytes.weights_of,
    "compressed-tensors": compressed_tensors.weights_of,
    "fbgemm_fp8": fp8.weights_of,
    "fp8": fp8.weights_of,
    "gptq": gptq.weights_of,
    "mxfp4": mxfp4.weights_of,
}


def checkpoint_tensors(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Weight]:
    """What ``from_pretrained`` would load from a folder, by key; reads headers only.

    Weights that are stored as codes and scales are among them as what they stand for.

    Args:
        folder: The checkpoint.
        config: Its ``config.json``.

    Returns:
        Nothing where transformers must load them whole: pickles, and some GGUF files.

    Raises:
        CheckpointError: They are quantized with a method that is not known, or not as it says.
    """
    if (folder / GGUF_LINK).is_symlink():
        return gguf_weights(folder, config)
    held = {
        key: StoredWeight(path, key, place)
        for path in safetensors_files(folder)
        for key, place in read_header(path).items()
    }
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        _check_fp8(
            held, (key for key in held if f"{key}_scale" in held or f"{key}_scale_inv" in held)
        )
        return dict(held)
    method = str(settings.get("quant_method", "an unknown method"))
    if any(settings.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"  # whose older configs do not name it
    if method not in FORMATS or not held:
        place = "" if held else " in files other than safetensors"
        raise CheckpointError(
            f"{folder} has weights quantized with {method}{place}, which are not supported",
            "Name the checkpoint that they were made from, in float32, float16 or bfloat16.",
        )
    weights = FORMATS[method](held, settings)
    _check_fp8(held, (key for key, weight in weights.items() if isinstance(weight, StoredWeight)))
    return weights


def _check_fp8(held: Mapping[str, StoredWeight], keys: Iterable[str]) -> None:
    """Refuse codes of FP8 among weights: they are numbers, but not those of the weight."""
    for key in keys:
        if held[key].dtype in FP8:
            raise CheckpointError(
                f"{key} in {held[key].path} is of FP8, and the quantization_config of config.json "
                "does not say how it is scaled",
                "Correct it, or name the checkpoint that the weights were made from.",
            )
