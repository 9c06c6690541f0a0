"""A short ``repr`` and an HTML view of results, for people at a prompt or in a notebook."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

_LONGEST = 200  # characters of a fact


class Shown(ABC):
    """An object that is shown by a few facts instead of all it holds.

    A dataclass needs ``repr=False``, or it writes a ``repr`` of its own.
    """

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """The facts, by name; ``None`` is left out."""

    def _known(self) -> dict[str, str]:
        facts = {name: str(fact) for name, fact in self.facts().items() if fact is not None}
        return {
            name: fact if len(fact) <= _LONGEST else f"{fact[:_LONGEST]}…"
            for name, fact in facts.items()
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}: {fact}" for name, fact in self._known().items())
        return f"<{type(self).__name__} {facts}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(fact)}</td></tr>"
            for name, fact in self._known().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


class ByName(Shown):
    """A result whose values can be read by name, as ``result["logits"]``."""

    def __getitem__(self, name: str) -> Any:
        """An attribute by its name."""
        if name not in vars(self):
            raise KeyError(name)
        return getattr(self, name)
