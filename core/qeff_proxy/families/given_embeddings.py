"""Run a model that takes no embeddings: its token embedding gives those that it is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from qeff_proxy.layers.layer_lists import ModuleT
from qeff_proxy.layers.replace_modules import replace_modules

_GIVEN: ContextVar[torch.Tensor] = ContextVar("given")
_STAND_IN = 5  # no padding, and none of the special tokens at the beginning of most vocabularies


class _Given(nn.Module):
    """Stands for the token embedding."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 (stand-ins)
        """The embeddings of `embeddings_given`."""
        return _GIVEN.get()


def takes_embeddings(model: nn.Module) -> bool:
    """Whether a model takes ``inputs_embeds``."""
    return "inputs_embeds" in inspect.signature(model.forward).parameters


def with_given_embeddings(model: ModuleT, table: nn.Module) -> ModuleT:
    """A copy of ``model`` that runs in `embeddings_given` only, without its ``table``."""
    named = model.named_modules(remove_duplicate=False)
    return replace_modules(model, {path: _Given() for path, one in named if one is table})


def needs_given(model: nn.Module) -> bool:
    """Whether a model is, or has in it, one of `with_given_embeddings`."""
    return any(isinstance(module, _Given) for module in model.modules())


@contextmanager
def embeddings_given(embeddings: torch.Tensor) -> Iterator[torch.Tensor]:
    """Let models of `with_given_embeddings` run on ``embeddings [batch, sequence, width]``.

    Yields token ids ``[batch, sequence]`` that stand for the true ones. What else a model takes
    from those, it takes from other tokens: the comparison with the uncut model tells.
    """
    token = _GIVEN.set(embeddings)
    try:
        yield torch.full_like(embeddings[..., 0], _STAND_IN, dtype=torch.int64)
    finally:
        _GIVEN.reset(token)


@contextmanager
def on_embeddings(model: nn.Module, embeddings: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the argument by which ``model`` runs on ``embeddings [batch, sequence, width]``."""
    if not needs_given(model):
        yield {"inputs_embeds": embeddings}
        return
    ids = next(iter(inspect.signature(model.forward).parameters))
    with embeddings_given(embeddings) as stand_ins:
        yield {ids: stand_ins}
