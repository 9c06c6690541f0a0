"""The weights of a checkpoint by their names in it, whatever it stores them as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qeff_proxy.load.checkpoint_files import GGUF_LINK, safetensors_files
from qeff_proxy.load.gguf_files import gguf_weights
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.load.weight_sources import StoredWeight, Weight


def checkpoint_tensors(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Weight]:
    """What ``from_pretrained`` would load from a folder, by key; reads headers only.

    Args:
        folder: The checkpoint.
        config: Its ``config.json``.

    Returns:
        Nothing where transformers must load them whole: pickles, and some GGUF files.
    """
    if (folder / GGUF_LINK).is_symlink():
        return gguf_weights(folder, config)
    return {
        key: StoredWeight(path, key, place)
        for path in safetensors_files(folder)
        for key, place in read_header(path).items()
    }
