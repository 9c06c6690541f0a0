"""Where a model's vocabulary-sized ends are: the results of the two ``locate`` hooks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Absent", "Site"]


@dataclass(frozen=True)
class Site:
    """A place where the model is cut.

    Attributes:
        module: Dotted path of the module, as in ``model.get_submodule(path)``.
        tables: Dotted paths of the parameters that make up the site (weight, bias, a second
            table). Empty means every parameter of the module.
        scale: What the module multiplies its rows by (Gemma's square root of the hidden size),
            for information; the module itself applies it. ``None`` where there is no scale.
        follows: The operations applied to the module's output before the model returns it, in
            order (``"div"``, ``"tanh"``, ``"mul"`` for a soft cap), for information; they go
            into the LM head part. Empty where the output is returned as it is.
    """

    module: str
    tables: tuple[str, ...] = ()
    scale: float | None = None
    follows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absent:
    """The model has no such site, by design.

    Attributes:
        reason: Why, in a sentence a user can read (``"audio goes in, not token ids"``).
    """

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("Absent needs a reason: say why the model has no such site.")
