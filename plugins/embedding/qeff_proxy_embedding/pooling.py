"""Pooling: from a hidden state per token to one vector per text, inside the exported graph.

Rows are padded on the right, and padding is ignored. The rules are those of
sentence-transformers' ``Pooling`` and ``Normalize`` modules, whose settings `pooling_of_checkpoint`
reads from ``modules.json`` and ``1_Pooling/config.json``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from qeff_proxy.common.messages import an
from qeff_proxy.errors import CheckpointError, UnsupportedModelError, UsageError

__all__ = ["POOLINGS", "Pooling", "pooling_of_checkpoint", "pooling_of_options"]

#: The named poolings, and ``none`` for hidden states without pooling.
POOLINGS = ("mean", "cls", "max", "last", "none")

# sentence-transformers' names: in one field, or as one flag each.
_MODES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class Pooling:
    """How hidden states are pooled to a vector.

    Attributes:
        name: One of `POOLINGS`, or ``module:function`` for the user's function.
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

    def __call__(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """Pool.

        Args:
            hidden: ``[batch, sequence, hidden]``.
            padding_mask: ``[batch, sequence]`` int64, 1 for a token; padding is on the right.

        Returns:
            ``[batch, width]``, or ``hidden`` itself without pooling.
        """
        if not self.pools:
            return hidden
        vector = self._pool(hidden, padding_mask)
        if self.truncate_dim is not None:
            vector = vector[:, : self.truncate_dim]
        if self.normalize:
            vector = torch.nn.functional.normalize(vector, p=2, dim=-1)
        return vector

    def _pool(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            return self.function(hidden, padding_mask)
        if self.name == "cls":
            return hidden[:, 0]
        weights = padding_mask.to(hidden.dtype).unsqueeze(-1)
        if self.name == "max":
            lowest = torch.finfo(hidden.dtype).min
            return hidden.masked_fill(weights == 0, lowest).amax(dim=1)
        if self.name == "mean":
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        # Select the token without a following token by a weighted sum: some compilers refuse a
        # gather whose index is computed from the mask.
        following = torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1)
        return (hidden * (weights - following)).sum(dim=1)

    def to_json(self) -> dict[str, Any]:
        """The settings from which `pooling_of_options` restores it."""
        return {
            "pooling": self.name,
            "normalize": self.normalize,
            "truncate_dim": self.truncate_dim,
        }


def pooling_of_options(options: Mapping[str, Any], folder: Path | None, width: int) -> Pooling:
    """The pooling of the user's options, or else the checkpoint's.

    Args:
        options: ``pooling`` (one of `POOLINGS`, a function, or ``module:function``),
            ``normalize`` and ``truncate_dim``. Without ``pooling`` the checkpoint's pooling and
            normalization are used; if it has none, hidden states are not pooled.
        folder: The checkpoint's; ``None`` for a model created in memory.
        width: Of the hidden states.

    Raises:
        UsageError: The options are invalid.
        CheckpointError: The checkpoint's settings cannot be read.
        UnsupportedModelError: The checkpoint needs a pooling that is none of `POOLINGS`.
    """
    wanted = options.get("pooling")
    normalize = options.get("normalize")
    if normalize is not None and not isinstance(normalize, bool):
        raise UsageError(f"normalize is {normalize!r}", "It must be True or False.")
    if wanted is None:
        own = pooling_of_checkpoint(folder) if folder is not None else Pooling("none")
        normalize = own.normalize if normalize is None else normalize
        wanted = own.name
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
    if isinstance(wanted, str) and wanted in POOLINGS:
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


def pooling_of_checkpoint(folder: Path) -> Pooling:
    """The pooling in ``modules.json`` and the configs it names; none without that file.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedModelError: It has a module that cannot be exported, such as a dense layer.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return Pooling("none")
    name, normalize = "none", False
    try:
        for module in json.loads(modules.read_text(encoding="utf-8")):
            kind = str(module["type"]).rpartition(".")[2]
            if kind == "Pooling":
                path = folder / module["path"] / "config.json"
                name = _mode_of(json.loads(path.read_text(encoding="utf-8")), path)
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise UnsupportedModelError(
                    f"{modules} has {an(kind)} module, which is not exported",
                    "Give pooling= to take the vectors before it, or run it on them yourself.",
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the pooling that {modules} describes cannot be read: {error}",
            "Download the checkpoint again, or give pooling=.",
        ) from error
    return Pooling(name, normalize and name != "none")


def _mode_of(config: Mapping[str, Any], path: Path) -> str:
    """The pooling that a ``Pooling`` module's config names, in the new or the old form."""
    said = config.get("pooling_mode")
    modes = [said] if isinstance(said, str) else list(said or ())
    if said is None:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [key.removeprefix("pooling_mode_") for key in flags]
        names = [_FLAGS.get(key) for key in flags]
    else:
        names = [_MODES.get(mode) for mode in modes]
    if len(names) == 1 and names[0] is not None:
        return names[0]
    raise UnsupportedModelError(
        f"{path} asks for the pooling {' and '.join(map(str, modes)) or 'of nothing'}",
        f"Give pooling=: one of {', '.join(POOLINGS)}, or a function.",
    )
