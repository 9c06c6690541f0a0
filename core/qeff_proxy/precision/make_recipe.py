"""Make a recipe: search what has to stay wide, then prove it on the backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.recipe import OPTION, Recipe, identity_of
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.json_schema import plain_json
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.precision.distance import LOGITS, Distance
from qeff_proxy.precision.prepare import prepare
from qeff_proxy.precision.run_backend import run_backend
from qeff_proxy.precision.search import Found, Goal, search
from qeff_proxy.request import Request
from qeff_proxy.verify.options import VerifyOptions

#: How often the search goes on where the backend needs more than the simulation said, and how many
#: dB above what is lacking it then aims.
_TRIES, _MORE = 3, 0.5


@dataclass(frozen=True)
class Result:
    """A recipe, and what was measured.

    Attributes:
        recipe: The recipe.
        export: The export that was searched.
        found: By the search.
        how: What the search's numbers are of, in words.
        before: The whole model on the backend, with everything low; ``None`` where nothing was
            proven.
        after: The same with the recipe.
        reached: Whether the goal was reached, on the backend where something was proven.
    """

    recipe: Recipe
    export: Export
    found: Found
    how: str
    before: Distance | None
    after: Distance | None
    reached: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ratio is ``None``."""
        facts = {name: one for name, one in vars(self).items() if name not in ("export", "found")}
        found = {n: v for n, v in vars(self.found).items() if n != "wide"}
        found["recovered"] = self.found.recovered
        value: dict[str, Any] = plain_json({**facts, "found": found})
        return value


def make_recipe(
    model: str | Path | LoadedModel | Export,
    backend: str,
    precision: str,
    goal: Goal,
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    prove: bool = True,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Result:
    """Find the smallest set of modules that has to stay wide, and prove it on the backend.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export with layer taps.
        backend: The backend's name.
        precision: One of its ``precisions``.
        goal: What to reach.
        request: The input; by default the flow's example.
        options: Of the export and the backend, as for a verification.
        prove: Compile the whole model with the recipe, run it, and compare it with PyTorch.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: The backend lacks the precision or cannot obey a recipe, or the model has no
            tokens to be the same.
        UnsupportedModelError: The model cannot be run layer by layer.
        BackendError: The backend refuses the whole model, or fails on it, with a recipe of greedy
            search alone, too.
    """
    if prove and OPTION not in load_backend(backend).options:
        raise UsageError(
            f"backend {backend!r} cannot obey a recipe, so nothing can be proven on it",
            "Say --no-proof, and give the recipe to its own tools with --nodes.",
        )
    ready = prepare(
        model,
        backend,
        precision,
        request,
        options,
        hooks,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if goal.same_tokens and all(spec.name != LOGITS for spec in ready.export.parts[-1].outputs):
        raise UsageError("the model gives no logits: no tokens can be the same", "Aim at dB.")
    identity = identity_of(ready.export)

    def recipe_of(found: Found) -> Recipe:
        wide = tuple(one for one in ready.variants.units if one in found.wide)
        source, figures = ready.export.model["source"], _measured(found, before, after)
        return Recipe(source, identity, backend, precision, wide, figures)

    before = after = None
    if prove:
        progress("running the backend with everything low")
        before = run_backend(ready, backend, None, progress)
    if before is not None and goal.most_wide is None:
        progress("running the backend with everything wide")
        found = search(ready.variants, Goal(), progress)
        with contextlib.suppress(BackendError):  # a compiler may refuse that, and not fewer
            after = run_backend(ready, backend, recipe_of(found), progress)
            if not goal.is_reached(after):
                return Result(
                    recipe_of(found), ready.export, found, ready.how, before, after, False
                )
        after = None
    aim, greedy = goal, False
    for attempt in range(1, _TRIES + 1):
        found = search(ready.variants, aim, progress, greedy=greedy)
        recipe = recipe_of(found)
        if before is None:
            return Result(recipe, ready.export, found, ready.how, None, None, found.reached)
        progress("running the backend with the recipe")
        try:
            after = run_backend(ready, backend, recipe, progress)
        except BackendError:  # compilers refuse some mixtures: fewer modules make a simpler one
            if greedy or attempt == _TRIES:
                raise
            greedy = True
            continue
        reached = found.reached and _is_proven(goal, before, after)
        if reached or not found.left or goal.most_wide is not None or attempt == _TRIES:
            break
        aim = _further(goal, found, after)
    return Result(recipe_of(found), ready.export, found, ready.how, before, after, reached)


def _is_proven(goal: Goal, before: Distance, after: Distance) -> bool:
    if goal.most_wide is not None:
        return after.sqnr > before.sqnr
    return goal.is_reached(after)


def _further(goal: Goal, found: Found, after: Distance) -> Goal:
    """What to aim at in the simulation where the backend is worse than it."""
    lacking = 3.0 if goal.sqnr is None else goal.sqnr - after.sqnr
    return Goal(sqnr=found.distance.sqnr + lacking + _MORE)


def _measured(found: Found, before: Distance | None, after: Distance | None) -> Mapping[str, float]:
    """The figures that a recipe's file has."""
    figures = {
        "wide_share": round(found.share, 6),
        "simulated_low_db": found.low.sqnr,
        "simulated_db": found.distance.sqnr,
    }
    for name, one in (("backend_low", before), ("backend", after)):
        if one is not None:
            figures[f"{name}_db"] = one.sqnr
        if one is not None and one.kl is not None and one.top1 is not None:
            figures |= {f"{name}_kl": one.kl, f"{name}_same_tokens": one.top1}
    return {name: float(f"{v:.6g}") for name, v in figures.items() if math.isfinite(v)}
