"""Molmo from the checkpoints' code (``MolmoForCausalLM``).

Features are added to the embeddings at the positions in ``image_input_idx``; there is no image
token. The embedding has two tables, and more rows than the head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qeff_proxy.arrays import Array, dtype_name, to_tensor
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.load.checkpoint_files import read_config_file
from qeff_proxy.parts import Kind, Part, Proxy, TensorSpec
from qeff_proxy.request import Request, refuse_others
from qeff_proxy.sites import Site
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import ImageSettings, Merge
from qeff_proxy_vision.images import open_image
from qeff_proxy_vision.inputs import checked_tensors, decode, prompts_and_images
from qeff_proxy_vision.molmo_processor import corrected
from qeff_proxy_vision.own_code import PairsBody, language_parts, stepped_logits
from qeff_proxy_vision.own_processor import load_own_processor
from qeff_proxy_vision.proxy import VisionProxy, add_vision, marked_text
from qeff_proxy_vision.remote import load_adapted
from qeff_proxy_vision.towers import FeaturesPart

__all__ = [
    "Loader",
    "build_proxy",
    "decode",
    "locate_embedding",
    "locate_lm_head",
    "preprocess",
]

_TRANSFORMER = "model.transformer"
_IMAGES = ("images", "image_masks", "image_input_idx")


class Loader:
    """Loads such a checkpoint; an entry point of the group ``qeff_proxy.remote_code``."""

    @staticmethod
    def from_pretrained(folder: Path, **arguments: Any) -> Any:
        """Like transformers' ``from_pretrained``."""
        arguments.pop("attn_implementation", None)  # the code has only one of its own
        return load_adapted(folder, read_config_file(folder).get("auto_map") or {}, {}, **arguments)

    @staticmethod
    def load_processor(folder: Path) -> Any:
        """The checkpoint's processor, corrected."""
        return load_own_processor(folder, corrected)


class _TwoTables(nn.Module):
    """``wte`` without concatenating its tables in each call, which would copy gigabytes.

    Args:
        embedding: With ``embedding [vocabulary, hidden]`` and ``new_embedding [added, hidden]``.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.known: Any = embedding.embedding
        self.added: Any = embedding.new_embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[batch, sequence]`` to ``[batch, sequence, hidden]``."""
        known, added = self.known.shape[0], self.added.shape[0]
        first = functional.embedding(input_ids.clamp(max=known - 1), self.known)
        second = functional.embedding((input_ids - known).clamp(0, added - 1), self.added)
        return torch.where((input_ids < known)[..., None], first, second)


class _Mask:
    """The mask of one forward pass, in an object, which the tracer does not copy."""

    value: torch.Tensor | None = None


class _Body(PairsBody):
    """Blocks that use the host's mask, which has rows for the queries only.

    They slice theirs out of one with a row for each position, including past ones.
    """

    def __init__(self, transformer: Any, scale: float | None) -> None:
        super().__init__((), transformer.ln_f, "layer_past", None, scale)
        self.host = _Mask()
        self.layers = nn.ModuleList([self._masked(block) for block in transformer.blocks])

    def _masked(self, block: Any) -> Any:
        block = copy.copy(block)
        attend, mask = block._scaled_dot_product_attention, self.host  # noqa: SLF001 (its own code)

        def attend_by_mask(q: Any, k: Any, v: Any, **_: Any) -> Any:
            return attend(q, k, v, attn_mask=mask.value, dropout_p=0.0, is_causal=False)

        block._scaled_dot_product_attention = attend_by_mask  # noqa: SLF001
        return block

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """As of `PairsBody`."""
        self.host.value = tensors["attention_mask"]
        outputs = super().forward(**tensors)
        self.host.value = None
        return outputs


@hookimpl
def locate_embedding() -> Site:
    """``wte``, which may have two tables: for the vocabulary and for added tokens."""
    return Site(f"{_TRANSFORMER}.wte")


@hookimpl
def locate_lm_head(model: PreTrainedModel) -> Site:
    """``ff_out``."""
    if model.model.config.weight_tying:
        raise UnsupportedModelError(
            "this Molmo ties its head to its embedding, as no released one does",
            "Untie them, or write a plugin for it.",
        )
    scaled = model.model.config.scale_logits
    return Site(f"{_TRANSFORMER}.ff_out", follows=("mul",) if scaled else ())


@hookimpl
def build_proxy(model: PreTrainedModel, kind: Kind, options: Mapping[str, Any]) -> VisionProxy:
    """A vision part with the backbone; the language model is cut into its parts."""
    config = model.model.config
    text = marked_text(_text_parts(model, config), kind, options)
    dtype = dtype_name(model.dtype)
    vision = config.vision_backbone
    across, down = vision.image_num_patch
    patches, values = across * down, vision.image_patch_size**2 * 3
    rows_across, rows_down = config.llm_patches_per_crop()
    rows = rows_across * rows_down
    part = Part(
        "vision",
        FeaturesPart(
            model.model.vision_backbone,
            lambda own, images, image_masks: own(images, image_masks)[0],
        ),
        (
            TensorSpec("images", dtype, ("batch", "sequence", patches, values)),
            TensorSpec("image_masks", dtype, ("batch", "sequence", patches)),
        ),
        (TensorSpec("image_features", dtype, ("batch", "sequence", rows, config.d_model)),),
        "vision",
    )

    def sample() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        before, after = 3, 4
        index = torch.stack([torch.arange(before, before + rows), torch.full((rows,), -1)])
        masks = torch.rand(1, 2, patches, generator=generator).clamp(min=0.2).round(decimals=0)
        ids = torch.randint(1, config.vocab_size, (1, before + rows + after), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "images": torch.rand(1, 2, patches, values, generator=generator),
            "image_masks": masks,
            "image_input_idx": index[None],
        }

    settings = ImageSettings(None, (Merge("add"),), index="image_input_idx")
    return add_vision(text, part, settings, sample, _model_logits)


def _text_parts(model: PreTrainedModel, config: Any) -> Proxy:
    transformer, width = model.model.transformer, config.d_model
    wte = transformer.wte
    return language_parts(
        _TwoTables(wte) if hasattr(wte, "new_embedding") else wte,
        _Body(transformer, width**0.5 if config.normalize_input_embeds else None),
        transformer.ff_out,
        (config.effective_n_kv_heads, width // config.n_heads),
        width**-0.5 if config.scale_logits else None,
    )


def _model_logits(model: PreTrainedModel, tensors: Mapping[str, Array], new: Array) -> Array:
    """As `qeff_proxy_vision.reference.model_logits`."""
    images = {name: to_tensor(tensors[name]) for name in _IMAGES if name in tensors}
    return stepped_logits(partial(model, **images), model, tensors, new)


@hookimpl
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """The output of the checkpoint's processor for each row, padded on the left to one length.

    Inputs may have QEfficient's names: ``pixel_values`` and ``valid_idx``.

    Returns:
        ``input_ids`` and ``attention_mask [batch, length]``; ``images``, ``image_masks`` and
        ``image_input_idx``, ``[batch, crops, …]``, padded with crops without a position.
    """
    if request.inputs is not None:
        rows = checked_tensors(_named_as_the_processor(request.inputs))
        rows.setdefault("attention_mask", torch.ones_like(rows["input_ids"]))
        return rows
    refuse_others(request, "prompts", "images")
    if not request.prompts or processor is None:
        return None
    if not hasattr(processor, "process"):
        raise UsageError(
            f"the checkpoint's {type(processor).__name__} does not process images",
            "Its own processor needs torchvision and einops: pip install torchvision einops.",
        )
    outputs = [
        processor.process(images=[open_image(image) for image in images] or None, text=prompt)
        for prompt, images in prompts_and_images(request, "<|image|>")
    ]
    return _padded([{name: torch.as_tensor(row[name]) for name in row} for row in outputs])


def _named_as_the_processor(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without what QEfficient's scripts make of them: another name, and valid places."""
    rows = {name: value for name, value in inputs.items() if name != "valid_idx"}
    if "images" not in rows and "pixel_values" in rows:
        rows["images"] = rows.pop("pixel_values")
    return rows


def _padded(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows as a batch, with images moved as far as the ids before which there is padding."""
    ids = [row["input_ids"] for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    result = {"input_ids": left(ids), "attention_mask": left(ones)}
    seen = next((row for row in rows if "images" in row), {})
    for name in (name for name in _IMAGES if name in seen):
        pieces = [row.get(name, seen[name][:0]) for row in rows]
        result[name] = pad_sequence(pieces, batch_first=True, padding_value=-1)
    if seen:
        places, shifts = result["image_input_idx"], (1 - result["attention_mask"]).sum(1)
        result["image_input_idx"] = torch.where(places >= 0, places + shifts[:, None, None], places)
    return result
