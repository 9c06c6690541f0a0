"""The settings that sentence-transformers keeps beside a model's weights.

A folder saved by sentence-transformers holds ``modules.json`` (the modules that run one after
another), a folder with a config for each module, ``sentence_bert_config.json`` (lengths, lower
case) and ``config_sentence_transformers.json`` (prompts). Each setting that changes a vector is
read here, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import an, first_line
from qeff_proxy.errors import CheckpointError, UnsupportedModelError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

__all__ = ["DenseLayers", "SentenceFolder", "load_dense", "read_sentence_folder"]

#: Poolings by the names of sentence-transformers; `qeff_proxy_embedding.pooling` implements them.
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
# One flag each, in the order in which sentence-transformers concatenates them.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
#: The modules that are exported, in the only order in which they are.
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
_VECTORS = {None, "sentence_embedding"}
_WITHOUT = "Give pooling= to take the vectors before it, or run it on them yourself."
# Keys that are read here, or that change no vector of a text.
_TRANSFORMER_KEYS = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "message_format",
}


@dataclass(frozen=True)
class SentenceFolder:
    """What a folder says of its vectors.

    Attributes:
        pooling: Names of poolings, joined by ``+`` where their vectors are concatenated; ``none``
            where there is no pooling module.
        normalize: Divide the vector by its L2 norm.
        dense: Folders of the dense layers between pooling and normalization, in order.
        max_length: Most tokens of a text; ``None`` where nothing says.
        lower_case: Lower the case of every text.
        prompt: Put before every text.
    """

    pooling: str = "none"
    normalize: bool = False
    dense: tuple[Path, ...] = ()
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""


def read_sentence_folder(folder: Path | None, *, modules: bool = True) -> SentenceFolder:
    """Read the settings of a checkpoint; the defaults where it has none.

    Args:
        folder: The checkpoint's; ``None`` for a model made in memory.
        modules: Read its own pooling, dense layers and normalization, too.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedModelError: A setting or module changes the vectors and is not supported.
    """
    if folder is None:
        return SentenceFolder()
    transformer = _read(folder / "sentence_bert_config.json")
    general = _read(folder / "config_sentence_transformers.json")
    max_length = transformer.get("max_seq_length") or _read(folder / "tokenizer_config.json").get(
        "model_max_length"
    )
    pooling, dense, normalize, include_prompt = (
        _read_modules(folder / "modules.json") if modules else ("none", (), False, True)
    )
    prompt = _default_prompt(general, folder / "config_sentence_transformers.json")
    if prompt and not include_prompt:
        raise UnsupportedModelError(
            f"{folder} leaves its prompt {prompt!r} out of the pooling (include_prompt is false)",
            "Give pooling= and put the prompt before the texts yourself.",
        )
    if general.get("truncate_dim") is not None:
        raise UnsupportedModelError(
            f"{folder / 'config_sentence_transformers.json'} sets truncate_dim to "
            f"{general['truncate_dim']}",
            "Give truncate_dim= yourself (it truncates before normalizing), and take it out there.",
        )
    unknown = sorted(set(transformer) - _TRANSFORMER_KEYS - {"config_args", "model_args"})
    for key in unknown:
        if transformer[key]:
            raise UnsupportedModelError(
                f"{folder / 'sentence_bert_config.json'} sets {key}, which is not supported",
                "Take it out if it does not change the vectors.",
            )
    return SentenceFolder(
        pooling=pooling,
        normalize=normalize,
        dense=dense,
        # Tokenizers without a limit say a number of 30 digits.
        max_length=int(max_length) if max_length and 0 < max_length < 2**31 else None,
        lower_case=bool(transformer.get("do_lower_case")),
        prompt=prompt,
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}", "Download the checkpoint again."
        ) from error
    return value


def _default_prompt(general: Mapping[str, Any], path: Path) -> str:
    name = general.get("default_prompt_name")
    if name is None:
        return ""
    prompts = general.get("prompts")
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise CheckpointError(
            f"{path} names the prompt {name!r}, which is not among its prompts",
            "Download the checkpoint again.",
        )
    return str(prompts[name])


def _read_modules(path: Path) -> tuple[str, tuple[Path, ...], bool, bool]:
    """Pooling, dense layers, whether the vector is normalized, and whether prompts are pooled."""
    if not path.is_file():
        return "none", (), False, True
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(str(module["type"]).rpartition(".")[2], module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the pooling that {path} describes cannot be read: {error}",
            "Download the checkpoint again, or give pooling=.",
        ) from error
    order = [kind for kind, _ in kinds]
    for kind in order:
        if kind not in _ORDER:
            raise UnsupportedModelError(
                f"{path} has {an(kind)} module, which is not exported", _WITHOUT
            )
    if order != sorted(order, key=_ORDER.index) or order.count("Pooling") > 1:
        raise UnsupportedModelError(
            f"{path} runs its modules in the order {', '.join(order)}, which is not exported",
            _WITHOUT,
        )
    pooling, include_prompt = "none", True
    for kind, name in kinds:
        if kind == "Pooling":
            config = path.parent / name / "config.json"
            if not config.is_file():
                raise CheckpointError(
                    f"the pooling that {path} describes cannot be read: there is no {config}",
                    "Download the checkpoint again, or give pooling=.",
                )
            pooling, include_prompt = _read_pooling(_read(config), config)
    dense = tuple(path.parent / name for kind, name in kinds if kind == "Dense")
    if dense and pooling == "none":
        raise UnsupportedModelError(f"{path} has a Dense module and no Pooling module", _WITHOUT)
    return pooling, dense, "Normalize" in order and pooling != "none", include_prompt


def _read_pooling(config: Mapping[str, Any], path: Path) -> tuple[str, bool]:
    """The names of a ``Pooling`` module's config, in its new or its old form."""
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        unknown = sorted(set(flags) - set(_FLAGS))
        names = [name for flag, name in _FLAGS.items() if flag in flags]
        if unknown:
            names = []
        modes = [flag.removeprefix("pooling_mode_") for flag in flags]
    else:
        modes = [modes] if isinstance(modes, str) else list(modes)
        names = [_MODES[mode] for mode in modes if mode in _MODES]
        names = names if len(names) == len(modes) else []
    if not names:
        raise UnsupportedModelError(
            f"{path} asks for the pooling {' and '.join(map(str, modes)) or 'of nothing'}",
            f"Give pooling=: one of {', '.join(_MODES.values())}, or a function.",
        )
    return "+".join(names), bool(config.get("include_prompt", True))


class DenseLayers(nn.Sequential):
    """Linear layers with their activations, applied to ``[batch, width]``.

    Attributes:
        width: Of the result.
    """

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__(*layers)
        self.width = width


def load_dense(folders: tuple[Path, ...], width: int) -> DenseLayers | None:
    """The dense layers that follow the pooling; ``None`` where there are none.

    Args:
        folders: Of the modules, each with ``config.json`` and ``model.safetensors``.
        width: Of the pooled vector.

    Raises:
        CheckpointError: A file is missing or damaged, or its sizes do not fit.
        UnsupportedModelError: The activation function or a setting is not supported.
    """
    layers: list[nn.Module] = []
    for folder in folders:
        config = _read(folder / "config.json")
        activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
        names = {config.get(f"module_{side}_name") for side in ("input", "output")}
        if activation not in _ACTIVATIONS or config.get("use_residual") or names - _VECTORS:
            raise UnsupportedModelError(
                f"{folder / 'config.json'} asks for more than a linear layer with one of the "
                f"activation functions {', '.join(_ACTIVATIONS)}",
                _WITHOUT,
            )
        linear = nn.Linear(width, config.get("out_features", 0), bool(config.get("bias", True)))
        path = folder / "model.safetensors"
        try:
            weights = load_file(path)
            linear.load_state_dict(
                {name.removeprefix("linear."): value for name, value in weights.items()}
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the dense layer {path} cannot be read: {first_line(error)}",
                "Save the checkpoint as safetensors, or download it again.",
            ) from error
        layers += [linear, getattr(nn, activation)()]
        width = linear.out_features
    return DenseLayers(layers, width).eval() if layers else None
