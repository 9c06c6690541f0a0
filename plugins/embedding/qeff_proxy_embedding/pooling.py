"""Pooling: from a hidden state per token to one vector per text, inside the exported graph.

Rows are padded on the right, and padding never counts. The rules are those of
sentence-transformers' ``Pooling`` and ``Normalize`` modules, whose settings a checkpoint's folder
has (`qeff_proxy_embedding.sentence_folder`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from qeff_proxy.errors import UsageError

from qeff_proxy_embedding.sentence_folder import SentenceFolder

__all__ = ["POOLINGS", "Pooling", "pooling_of_options"]

#: The poolings that have a name, and ``none``: hidden states as they are. Several joined by ``+``
#: give their vectors concatenated.
POOLINGS = ("mean", "cls", "max", "last", "mean_sqrt_len", "weighted_mean", "none")


@dataclass(frozen=True)
class Pooling:
    """How hidden states are pooled to a vector.

    Attributes:
        name: One of `POOLINGS`, several of them joined by ``+``, or ``module:function`` for a
            function of the user's.
        normalize: Divide the vector by its L2 norm.
        truncate_dim: Keep this many of the first elements, before normalizing (Matryoshka).
        function: The user's function: ``last_hidden_state [batch, sequence, hidden]`` and
            ``attention_mask [batch, sequence]`` (1 for a token) to ``[batch, width]``.
    """

    name: str
    normalize: bool = False
    truncate_dim: int | None = None
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @property
    def pools(self) -> bool:
        """Whether it gives one vector per text."""
        return self.name != "none"

    @property
    def parts(self) -> int:
        """How many vectors are concatenated."""
        return 1 if self.function is not None else self.name.count("+") + 1

    def __call__(
        self,
        hidden: torch.Tensor,
        padding_mask: torch.Tensor,
        dense: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Pool.

        Args:
            hidden: ``[batch, sequence, hidden]``.
            padding_mask: ``[batch, sequence]`` int64, 1 for a token; padding is on the right.
            dense: Layers that follow the pooling, ``[batch, width]`` to ``[batch, width]``.

        Returns:
            ``[batch, width]``, or ``hidden`` itself without pooling.
        """
        if not self.pools:
            return hidden
        vector = self._pool(hidden, padding_mask)
        if dense is not None:
            vector = dense(vector)
        if self.truncate_dim is not None:
            vector = vector[:, : self.truncate_dim]
        if self.normalize:
            # As ``torch.nn.functional.normalize`` does, whose ``expand_as`` PyTorch traces twice.
            vector = vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return vector

    def _pool(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            return self.function(hidden, padding_mask)
        vectors = [_pool(name, hidden, padding_mask) for name in self.name.split("+")]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)

    def to_json(self) -> dict[str, Any]:
        """The settings from which `pooling_of_options` restores it."""
        return {
            "pooling": self.name,
            "normalize": self.normalize,
            "truncate_dim": self.truncate_dim,
        }


def _pool(name: str, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """One vector per row ``[batch, hidden]`` by one of `POOLINGS`."""
    if name == "cls":
        return hidden[:, 0]
    weights = padding_mask.to(hidden.dtype).unsqueeze(-1)
    if name == "max":
        lowest = torch.finfo(hidden.dtype).min
        return hidden.masked_fill(weights == 0, lowest).amax(dim=1)
    if name == "weighted_mean":  # each token by its position, counted from 1
        weights = weights * torch.cumsum(weights, dim=1)
    total = (hidden * weights).sum(dim=1)
    count = weights.sum(dim=1).clamp(min=1)
    if name == "mean_sqrt_len":
        return total / count.sqrt()
    if name in {"mean", "weighted_mean"}:
        return total / count
    # The last token is the one that no other follows: a sum that every compiler takes,
    # where an index computed from the mask would be a gather that some refuse.
    following = torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1)
    return (hidden * (weights - following)).sum(dim=1)


def pooling_of_options(
    options: Mapping[str, Any], folder: SentenceFolder | None, width: int
) -> Pooling:
    """The pooling that a user asks for, or else the checkpoint's own.

    Args:
        options: ``pooling`` (one of `POOLINGS`, a function, or ``module:function``),
            ``normalize`` and ``truncate_dim``. Without ``pooling`` the checkpoint decides, and
            whether it normalizes counts too; with neither, hidden states are given as they are.
        folder: The checkpoint's settings; ``None`` for a model made in memory.
        width: Of the vector.

    Raises:
        UsageError: The options cannot be right.
    """
    wanted = options.get("pooling")
    normalize = options.get("normalize")
    if normalize is not None and not isinstance(normalize, bool):
        raise UsageError(f"normalize is {normalize!r}", "It must be True or False.")
    if wanted is None:
        own = folder or SentenceFolder()
        normalize = own.normalize if normalize is None else normalize
        wanted = own.pooling
    truncate_dim = options.get("truncate_dim")
    if truncate_dim is not None and (
        not isinstance(truncate_dim, int) or not 1 <= truncate_dim <= width
    ):
        raise UsageError(
            f"truncate_dim is {truncate_dim!r}", f"It must be a whole number from 1 to {width}."
        )
    if wanted == "none" and (normalize or truncate_dim):
        raise UsageError(
            "without a pooling there is no vector to normalize or truncate",
            f"Give pooling=: one of {', '.join(POOLINGS[:-1])}, or a function.",
        )
    name, function = _named(wanted)
    return Pooling(name, bool(normalize), truncate_dim, function)


def _named(wanted: Any) -> tuple[str, Callable[..., torch.Tensor] | None]:
    if callable(wanted):
        module = getattr(wanted, "__module__", "?")
        return f"{module}:{getattr(wanted, '__qualname__', '?')}", wanted
    if isinstance(wanted, str) and (wanted in POOLINGS or _is_several(wanted)):
        return wanted, None
    if isinstance(wanted, str) and ":" in wanted:
        module, _, attribute = wanted.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(
                f"the pooling {wanted!r} cannot be found: {error}",
                "Give the function itself, or put it at the top of a module that can be imported.",
            ) from error
        return wanted, found
    raise UsageError(
        f"pooling {wanted!r} is none of {', '.join(POOLINGS)}",
        "Or give a function of last_hidden_state and attention_mask.",
    )


def _is_several(name: str) -> bool:
    return "+" in name and set(name.split("+")) <= set(POOLINGS) - {"none"}
