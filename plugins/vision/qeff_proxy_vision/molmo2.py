"""Molmo2: image features are added to the embeddings of the image tokens.

Patches of all crops are pooled by an index from the processor. The host drops index rows without a
patch, so that no shape in the graph depends on values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.parts import Kind, Part, TensorSpec
from qeff_proxy.sites import Absent, Site
from torch import nn
from transformers import PreTrainedModel

from qeff_proxy_vision.image_settings import Blocks, ImageSettings, Merge
from qeff_proxy_vision.inputs import decode, preprocess
from qeff_proxy_vision.proxy import VisionProxy, add_vision, cut_text, sample_prompt

__all__ = ["PoolingPart", "build_proxy", "decode", "preprocess"]

_TYPES = "mm_token_type_ids"
_POOLED = 4  # patches pooled into one row: 2 x 2 in the released checkpoints


class PoolingPart(nn.Module):
    """The tower, and the adapter's pooling attention and projector on some of its layers.

    Args:
        tower: Takes patches and returns ``hidden_states``.
        adapter: The module with ``image_pooling_2d`` and ``image_projector``.
        layers: The layers whose outputs are concatenated.
    """

    def __init__(self, tower: nn.Module, adapter: nn.Module, layers: list[int]) -> None:
        super().__init__()
        self.tower = tower
        self.pooling: Any = adapter.image_pooling_2d
        self.projector: Any = adapter.image_projector
        # The first hidden state is the input of the first layer.
        self.layers = [layer + 1 if layer >= 0 else layer for layer in layers]

    def forward(
        self, pixel_values: torch.Tensor, image_token_pooling: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """``[batch, patches, values]`` and ``[rows, pooled]`` int64 to ``image_features``.

        Returns:
            ``[rows, hidden]``.
        """
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        patches = torch.cat([states[layer] for layer in self.layers], dim=-1).flatten(0, 1)
        valid = image_token_pooling >= 0
        chosen = patches[image_token_pooling.clamp(min=0)] * valid[..., None].to(patches.dtype)
        count = valid.sum(-1).clamp(min=1).to(patches.dtype)
        query = chosen.sum(-2, keepdim=True) / count[:, None, None]
        lowest = torch.finfo(patches.dtype).min
        mask = torch.zeros_like(chosen[..., 0]).masked_fill(~valid, lowest)[:, None, None]
        pooled, _ = self.pooling(query, chosen, attention_mask=mask)
        return {"image_features": self.projector(pooled.squeeze(1))}


@hookimpl
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> VisionProxy:
    """A vision part with tower, pooling and projector; the language model is cut as usual."""
    text_proxy = cut_text(model, embedding, lm_head, kind, options)
    config, inner = model.config, model.model
    vision, text = config.vision_config, config.text_config
    dtype = dtype_name(model.dtype)
    patches = vision.num_position_embeddings
    values = vision.num_channels * vision.patch_size**2
    adapter = inner.multi_modal_projector
    part = Part(
        "vision",
        PoolingPart(inner.vision_tower, adapter, config.adapter_config.vision_feature_layer),
        (
            TensorSpec("pixel_values", dtype, ("batch", patches, values)),
            TensorSpec("image_token_pooling", "int64", ("sequence", "pooled")),
        ),
        (TensorSpec("image_features", dtype, ("sequence", text.hidden_size)),),
        "vision",
        trace_sizes={"pooled": _POOLED},
    )

    def sample() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows = patches // _POOLED
        pooling = torch.randperm(patches, generator=generator)[: rows * _POOLED]
        pooling = pooling.reshape(rows, _POOLED)
        pooling[0, 1:] = -1
        images = {
            "pixel_values": torch.randn(1, patches, values, generator=generator),
            "image_token_pooling": torch.cat([pooling, torch.full((1, _POOLED), -1)]),
            "image_grids": torch.tensor([[1, rows, 0, 0]]),
        }
        return sample_prompt(
            images, (0, rows), config.image_patch_id, text.vocab_size, types=_TYPES
        )

    settings = ImageSettings(
        config.image_patch_id,
        (Merge("add"),),
        blocks=Blocks(_TYPES, "row"),
        skip_negative="image_token_pooling",
    )
    return add_vision(text_proxy, part, settings, sample)
