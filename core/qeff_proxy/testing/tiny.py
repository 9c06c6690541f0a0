"""Tiny models with random weights, and inputs for them, for conformance suites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The vocabulary size of a tiny model. No other size in it is equal, so that an axis of this size
#: identifies a tensor of the vocabulary.
VOCABULARY = 131

# Configs' names for their sizes.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "hidden_dim": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "max_position_embeddings": 96,
    "n_positions": 96,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of an architecture of transformers, with small sizes.

    Args:
        model_type: Its ``model_type``.
        changes: Further or other sizes.

    Raises:
        UsageError: transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"transformers knows no model type {model_type!r}",
            "Register its config with transformers.AutoConfig, or override make_model.",
        )
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    layer_types = getattr(default, "layer_types", None)
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if getattr(default, name, None) is not None or name.endswith("_token_id")
    }
    if hasattr(default, "vocab_size"):  # recognizers leave it to the checkpoint: None
        sizes["vocab_size"] = VOCABULARY
    if layer_types:  # the kinds in turn
        kinds = list(dict.fromkeys(layer_types))
        sizes["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        if "num_hidden_layers" in sizes:
            sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return kind(**{**sizes, **changes})


#: Configs' names for their numbers of layers, beside those that they map to the first.
_DEPTHS = ("num_hidden_layers", "depth", "decoder_layers", "num_decoder_layers", "encoder_layers")
_SMALLER = ("encoder", "vision", "audio")
_MODALITIES = ("image", "video", "audio")


def deepen_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Set the number of layers in a config and those within it; the kinds of layers repeat.

    An encoder or a tower gets two layers fewer than the decoder.
    """
    for name, value in list(vars(config).items()):
        fewer = 2 * any(word in name for word in _SMALLER)
        if hasattr(value, "to_diff_dict"):
            deepen_config(value, layers - fewer)
        elif name.endswith("layer_types") and value:
            setattr(config, name, (list(value) * layers)[:layers])
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, layers - 2 * ("encoder" in name))
    return config


def random_weights(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Set every parameter of ``model`` to random numbers, norms and biases included.

    With a norm of ones or a bias of zeros, a cut without it would not be detected.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.15)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = None  # always generate the requested number of tokens
        # A generated placeholder has no image, and the uncut model refuses it in one pass.
        generation.suppress_tokens = _placeholders(model.config) or None
    return model.eval()


def _placeholders(config: PreTrainedConfig) -> list[int]:
    """The token ids that stand for images, video and sound."""
    ids = {
        value
        for name, value in vars(config).items()
        if name.startswith(_MODALITIES) and name.endswith(("_token_id", "_token_index"))
        if isinstance(value, int)
    }
    return sorted(ids)


def random_ids(rows: int, lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    """Token ids ``[1, length]`` int64, one row for each length, from 3 to ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, rows, (1, length), generator=generator) for length in lengths]


def pad_row(row: Mapping[str, torch.Tensor], count: int, *, left: bool) -> dict[str, torch.Tensor]:
    """One row of inputs with padding before or after it.

    Tensors of the length of ``input_ids`` or ``input_values`` are padded with zeros, also in
    ``attention_mask``; others are not changed.

    Args:
        row: Tensors ``[1, length, …]`` by name.
        count: Positions to add.
        left: Pad before the row, not after it.
    """
    main = next(row[name] for name in ("input_ids", "input_values") if name in row)
    mask = row.get("attention_mask", torch.ones(main.shape[:2], dtype=torch.int64))
    padded = {}
    for name, tensor in {**row, "attention_mask": mask}.items():
        if tensor.dim() < 2 or tensor.shape[:2] != main.shape[:2]:
            padded[name] = tensor
            continue
        zeros = torch.zeros((1, count, *tensor.shape[2:]), dtype=tensor.dtype)
        padded[name] = torch.cat([zeros, tensor] if left else [tensor, zeros], dim=1)
    return padded


def join_rows(rows: Sequence[Mapping[str, torch.Tensor]], *, left: bool) -> dict[str, torch.Tensor]:
    """A batch of single rows, padded to the longest of them, left or right.

    Tensors without that length, such as images, are concatenated.
    """
    main = next((name for name in ("input_ids", "input_values") if name in rows[0]), None)
    padded = [dict(row) for row in rows]
    if main is not None:
        longest = max(row[main].shape[1] for row in rows)
        padded = [pad_row(row, longest - row[main].shape[1], left=left) for row in rows]
    return {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
