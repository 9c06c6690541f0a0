"""Search the smallest set of units that has to stay wide.

Greedy, on the simulation: from everything low, the unit is made wide that takes away the most noise
(for its weights, and in a second search at all), until the goal is reached. Noise of one unit hides
that of others, so each step measures the best candidates again, side by side (lazy greedy: M.
Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978). At the end
each unit that is not needed becomes low again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qeff_proxy.precision.distance import Distance
from qeff_proxy.precision.run_variants import Variants

#: So many candidates are measured in a step.
_CANDIDATES = 8
#: The share of weights that a unit counts as at least, so that one without any is not for nothing.
#: Both are tried: by noise for each weight, and by noise alone.
_LEAST = (0.002, 1.0)


@dataclass(frozen=True)
class Goal:
    """What a recipe has to reach; one of these.

    Attributes:
        sqnr: This many dB at the last outputs.
        same_tokens: The same first token at every position.
        most_wide: As many dB as this share of the weights can give.
    """

    sqnr: float | None = None
    same_tokens: bool = False
    most_wide: float | None = None

    def is_reached(self, distance: Distance) -> bool:
        """Whether a variant is good enough; for `most_wide` none is."""
        if self.same_tokens:
            return distance.top1 == 1.0
        return self.sqnr is not None and distance.sqnr >= self.sqnr


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        wide: The units that stay wide.
        share: Their share of the weights.
        distance: With these wide, in the simulation.
        low: With everything low.
        reached: Whether that is the goal.
        left: How many units stay low.
    """

    wide: frozenset[str]
    share: float
    distance: Distance
    low: Distance
    reached: bool
    left: int


def search(variants: Variants, goal: Goal, progress: Callable[[str], None]) -> Found:
    """Find the units that have to stay wide.

    Args:
        variants: Measures sets of low units.
        goal: What to reach.
        progress: Called with each step.
    """
    every = frozenset(variants.units)
    low, *single = variants.measure([every, *(every - {name} for name in every)])
    gains = {name: _gain(low, one) for name, one in zip(every, single, strict=True)}
    wide: frozenset[str] = frozenset()
    best = low
    if not math.isfinite(low.sqnr) and low.sqnr < 0:  # numbers overflow, each of them fatal alone
        alone = variants.measure([{name} for name in every])
        fatal = zip(every, alone, strict=True)
        wide = frozenset(name for name, one in fatal if one.sqnr == -math.inf)
        (best,) = variants.measure([every - wide])
    found = [_grown(variants, goal, wide, best, gains, least, progress) for least in _LEAST]
    wide, best = min(found, key=lambda one: _rank(variants, goal, *one))
    reached = goal.is_reached(best)
    if reached:
        wide, best = _without_needless(variants, goal, wide, best, every)
    elif goal.most_wide is not None:
        reached = variants.share(wide) <= goal.most_wide
    return Found(wide, variants.share(wide), best, low, reached, len(every - wide))


def _rank(
    variants: Variants, goal: Goal, wide: frozenset[str], best: Distance
) -> tuple[bool, float, float]:
    """The better of two results is the lower."""
    share = 0.0 if goal.most_wide is not None else variants.share(wide)
    return goal.most_wide is None and not goal.is_reached(best), share, -best.sqnr


def _grown(
    variants: Variants,
    goal: Goal,
    wide: frozenset[str],
    best: Distance,
    gains: Mapping[str, float],
    least: float,
    progress: Callable[[str], None],
) -> tuple[frozenset[str], Distance]:
    """Make units wide until the goal is reached, or nothing more fits or gains.

    Args:
        variants: Measures sets of low units.
        goal: What to reach.
        wide: The units to begin with.
        best: What these reach.
        gains: The noise that each unit takes away alone.
        least: The share of weights that a unit counts as at least.
        progress: Called with each step.
    """
    every, gains = frozenset(variants.units), dict(gains)

    def worth(name: str) -> float:
        return gains[name] / max(least, variants.share({name}))

    while not goal.is_reached(best):
        fitting = [name for name in sorted(every - wide) if _fits(variants, wide | {name}, goal)]
        chosen = sorted(fitting, key=worth, reverse=True)[:_CANDIDATES]
        if not chosen:
            break
        progress(f"{len(wide)} of {len(every)} wide: {best.sqnr:.1f} dB")
        found = dict(
            zip(chosen, variants.measure([every - wide - {one} for one in chosen]), strict=True)
        )
        gains |= {name: _gain(best, one) for name, one in found.items()}
        name = max(chosen, key=worth)
        if goal.most_wide is not None and gains[name] <= 0:
            break
        wide, best = wide | {name}, found[name]
    return wide, best


def _gain(before: Distance, after: Distance) -> float:
    """The noise that is taken away; 0 where there is no telling."""
    gain = before.noise - after.noise
    return 0.0 if math.isnan(gain) else gain


def _fits(variants: Variants, wide: frozenset[str], goal: Goal) -> bool:
    return goal.most_wide is None or variants.share(wide) <= goal.most_wide


def _without_needless(
    variants: Variants, goal: Goal, wide: frozenset[str], best: Distance, every: frozenset[str]
) -> tuple[frozenset[str], Distance]:
    """Make units low again, the largest first, as long as the goal is reached."""
    while wide:
        order = sorted(wide, key=lambda name: -variants.share({name}))
        found = variants.measure([every - wide | {name} for name in order])
        good = [(name, one) for name, one in zip(order, found, strict=True) if goal.is_reached(one)]
        if not good:
            break
        wide, best = wide - {good[0][0]}, good[0][1]
    return wide, best
