"""The hooks for Acme Scaled, whose decoder multiplies the token embeddings by a learned number.

The number belongs to the embedding but is outside its module, so the core's parts miss it. This
plugin starts from the core's parts and replaces the embedding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from qeff_proxy import Site, hookimpl
from qeff_proxy.families import generic
from qeff_proxy.families.decoder import DecoderPart, EmbeddingStub
from torch import nn

import acme_models.model  # noqa: F401 (registers the architecture)

#: The version of the hook API that this module uses.
qeff_proxy_api = 1


@hookimpl
def locate_embedding() -> Site:
    """The token embedding, and the number that its rows are multiplied by."""
    return Site("stack.words", tables=("stack.words.weight", "stack.scale"))


@hookimpl
def locate_lm_head() -> Site:
    """The head, and the operators that follow it."""
    return Site("to_words", follows=("div", "tanh", "mul"))


@hookimpl
def build_proxy(model, embedding, lm_head, kind):
    """Split: an embedding part with the number. Stub: no weight of the vocabulary."""
    proxy = generic.build_proxy(model, embedding, lm_head, kind)
    if kind == "split":
        scaled = ScaledEmbedding(model.stack)
        parts = [
            replace(part, module=scaled) if part.name == "embedding" else part
            for part in proxy.parts
        ]
        return replace(proxy, parts=tuple(parts))
    if kind == "stub":
        (part,) = proxy.parts
        stub = EmbeddingStub(model.config.hidden_size, model.dtype)
        bare = WithoutEnds(model.stack, stub)
        module = DecoderPart(bare, part.module.layout, "input_ids", "logits")
        return replace(proxy, parts=(replace(part, module=module),))
    return proxy  # the whole model


class ScaledEmbedding(nn.Module):
    """``input_ids [batch, query]`` to ``inputs_embeds [batch, query, hidden]``."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.words, self.scale = stack.words, stack.scale

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look up the embeddings, and scale them."""
        return {"inputs_embeds": self.words(input_ids) * self.scale}


class WithoutEnds(nn.Module):
    """The stack after a weightless embedding; its hidden states are used as the logits."""

    def __init__(self, stack: nn.Module, stub: nn.Module) -> None:
        super().__init__()
        self.stack, self.stub = stack, stub

    def forward(self, input_ids, position_ids=None, **rest):
        """Run the stack on the stub's embeddings."""
        return self.stack(inputs_embeds=self.stub(input_ids), position_ids=position_ids, **rest)
