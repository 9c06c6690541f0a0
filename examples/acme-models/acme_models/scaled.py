"""The hooks for Acme Scaled, whose decoder multiplies the words' rows by a learned number.

The number belongs to the embedding and lies outside of its module, so the parts that the core would
build leave it out. They are taken as they are but for the one that differs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from qeff_proxy import Site, hookimpl
from qeff_proxy.families import generic
from qeff_proxy.families.decoder import DecoderPart, EmbeddingStub
from torch import nn

import acme_models.model  # noqa: F401 (registers the architecture)

#: The version of the hooks that this was written for.
qeff_proxy_api = 1


@hookimpl
def locate_embedding() -> Site:
    """The table, and the number that its rows are multiplied by."""
    return Site("stack.words", tables=("stack.words.weight", "stack.scale"))


@hookimpl
def locate_lm_head() -> Site:
    """A head of its own, and what follows it."""
    return Site("to_words", follows=("div", "tanh", "mul"))


@hookimpl
def build_proxy(model, embedding, lm_head, kind):
    """Split: an embedding part with the number. Stub: no weight of the vocabulary at all."""
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
    return proxy  # the whole model, as it is


class ScaledEmbedding(nn.Module):
    """``input_ids [batch, query]`` to ``inputs_embeds [batch, query, hidden]``."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.words, self.scale = stack.words, stack.scale

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look the words up, and scale them."""
        return {"inputs_embeds": self.words(input_ids) * self.scale}


class WithoutEnds(nn.Module):
    """The stack behind a weightless embedding; its hidden states stand for the logits."""

    def __init__(self, stack: nn.Module, stub: nn.Module) -> None:
        super().__init__()
        self.stack, self.stub = stack, stub

    def forward(self, input_ids, position_ids=None, **rest):
        """Run the stack on what the stub makes of the ids."""
        return self.stack(inputs_embeds=self.stub(input_ids), position_ids=position_ids, **rest)
