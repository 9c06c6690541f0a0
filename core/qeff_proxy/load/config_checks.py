"""Refuse a ``config.json`` that cannot be right, before a model is built from it.

What transformers would build for hours, or out of the wrong class, is found by reading alone.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_files import safetensors_files
from qeff_proxy.load.safetensors_header import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LARGEST = 2**31 - 1
#: No model has more layers; a config that says so is held against the names of the weights.
_MANY_LAYERS = 512
_INDEX = re.compile(r"\.(\d+)\.")


def check_architectures(path: Path, config: dict[str, Any]) -> None:
    """Make sure that the architectures a config names are of its model type.

    Args:
        path: Of the ``config.json``, for the error.
        config: What it holds.

    Raises:
        CheckpointError: One is of other model types, so that it is not clear what the model is.
    """
    model_type = config.get("model_type")
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise CheckpointError(f"{path} says architectures {named!r}", "It must be a list of names.")
    for name in named:
        owners = _owners().get(str(name), set())
        if owners and model_type not in owners:
            raise CheckpointError(
                f"{path} says model_type {model_type!r} and architecture {name}, which is of "
                f"model type {' or '.join(sorted(owners))}",
                "Correct the one that is wrong.",
            )


@cache
def _owners() -> dict[str, set[str]]:
    """Of each class that transformers' auto classes know, the model types that it is for."""
    from transformers.models.auto import modeling_auto

    found: dict[str, set[str]] = {}
    for mapping, entries in vars(modeling_auto).items():
        if not mapping.endswith("_MAPPING_NAMES"):
            continue
        for model_type, classes in entries.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, set()).add(model_type)
    return found


def check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    """Make sure that a model of these sizes can be, and that the weights may be of it.

    Args:
        folder: The checkpoint's.
        config: Of the model.

    Raises:
        CheckpointError: A size is below 1 or absurd, or there are many more layers than the
            weights' names have numbers.
    """
    path = folder / "config.json"
    for one in (config, config.get_text_config(decoder=True)):
        for name in _SIZES:
            value = getattr(one, name, None)
            if type(value) is int and not 1 <= value <= _LARGEST:
                raise CheckpointError(
                    f"{path} says {_own_name(one, name)} {value}",
                    f"It must be from 1 to {_LARGEST}.",
                )
        layers = getattr(one, "num_hidden_layers", None)
        if type(layers) is int and layers > _MANY_LAYERS and layers > (held := _layers_of(folder)):
            raise CheckpointError(
                f"{path} says {_own_name(one, 'num_hidden_layers')} {layers}, and the weights are "
                f"of {held} layers",
                "Check that config.json and the weights belong together.",
            )


def _own_name(config: PreTrainedConfig, name: str) -> str:
    """What this config's file calls a size."""
    return str(getattr(config, "attribute_map", {}).get(name, name))


def _layers_of(folder: Path) -> int:
    """One more than the largest number in the weights' names."""
    names = (name for path in safetensors_files(folder) for name in read_header(path))
    return 1 + max((int(number) for name in names for number in _INDEX.findall(name)), default=-1)
