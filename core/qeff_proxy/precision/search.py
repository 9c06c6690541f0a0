"""Search the smallest set of units that has to stay wide, on the simulation.

1. Greedy, twice: from everything low, the unit is made wide that takes away the most noise (for its
   weights, and at all), until the goal is reached. Noise of one unit hides that of others, so each
   step measures the best candidates again, side by side (lazy greedy: M. Minoux, "Accelerated
   greedy algorithms for maximizing submodular set functions", 1978).
2. The other way round, twice: units become wide in the order of the noise that each makes alone,
   with all else wide. A value between two low units is rounded once for both, so making one of them
   wide gains nothing, and greedy search does not see what both would gain.
3. The best two results are improved by exchange: a unit becomes low and others wide, as long as
   that is better (floating search: P. Pudil et al., "Floating search methods in feature selection",
   1994).
4. Each unit that is not needed becomes low again.

Each set is measured once, and there are bounds on how many are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from qeff_proxy.precision.distance import Distance
from qeff_proxy.precision.run_variants import Variants

#: So many candidates are measured in a step of greedy search.
_CANDIDATES = 8
#: The share of weights that a unit counts as at least, so that one without any is not for nothing.
#: Both are tried: by noise for each weight, and by noise alone.
_LEAST = (0.002, 1.0)
#: Of an exchange: results that are improved, rounds, units that become low and that become wide.
_STARTS, _ROUNDS, _OUT, _IN = 2, 6, 4, 6
#: A unit of at least this share of the largest one's weights may become low for another.
_LARGE = 0.1
#: Where the goal is the most dB, units that give less than this together become low again.
_NEEDLESS = 0.1


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
        measured: How many sets were measured.
    """

    wide: frozenset[str]
    share: float
    distance: Distance
    low: Distance
    reached: bool
    left: int
    measured: int

    @property
    def recovered(self) -> float | None:
        """The share of the noise that is taken away; ``None`` where the noise is infinite."""
        return 1 - self.distance.noise / self.low.noise if math.isfinite(self.low.noise) else None


def search(
    variants: Variants, goal: Goal, progress: Callable[[str], None], *, greedy: bool = False
) -> Found:
    """Find the units that have to stay wide.

    Args:
        variants: Measures sets of low units.
        goal: What to reach; one out of reach, such as an empty one, gives everything wide.
        progress: Called with each step.
        greedy: Do no more than greedy search, which finds few units.
    """
    return _Search(variants, goal, progress).run(greedy=greedy)


class _Search:
    """One search; sets are of wide units.

    Args:
        variants: Measures sets of low units.
        goal: What to reach.
        progress: Called with each step.
    """

    def __init__(self, variants: Variants, goal: Goal, progress: Callable[[str], None]) -> None:
        self._variants, self._goal, self._progress = variants, goal, progress
        self._every = frozenset(variants.units)
        self._known: dict[frozenset[str], Distance] = {}
        self._alone: dict[str, float] = {}

    def run(self, *, greedy: bool) -> Found:
        """Search."""
        names = sorted(self._every)
        low, best = self._measure([frozenset(), self._every])
        if self._goal.most_wide is None and not self._goal.is_reached(best):
            return Found(self._every, 1.0, best, low, False, 0, len(self._known))
        found = self._measure([*({one} for one in names), *(self._every - {one} for one in names)])
        single, alone = found[: len(names)], found[len(names) :]
        gains = {name: _gain(low, one) for name, one in zip(names, single, strict=True)}
        self._alone = {name: one.noise for name, one in zip(names, alone, strict=True)}
        fatal = frozenset(name for name, noise in self._alone.items() if noise == math.inf)
        starts = [self._grown(fatal, gains, least) for least in _LEAST]
        if not greedy:
            starts += [self._filled(fatal, least) for least in _LEAST]
            starts = sorted(dict.fromkeys(starts), key=self._rank)[:_STARTS]
            starts = [self._exchanged(one) for one in starts]
        wide = min(starts, key=self._rank)
        wide = self._without_needless(wide)
        best, share = self._known[wide], self._variants.share(wide)
        most = self._goal.most_wide
        reached = self._goal.is_reached(best)
        if most is not None:
            reached = share <= most and best.sqnr > low.sqnr
        left = len(self._every - wide)
        return Found(wide, share, best, low, reached, left, len(self._known))

    def _measure(self, sets: Sequence[Set[str]]) -> list[Distance]:
        wanted = [frozenset(one) for one in sets]
        new = [one for one in dict.fromkeys(wanted) if one not in self._known]
        if new:
            found = self._variants.measure([self._every - one for one in new])
            self._known.update(zip(new, found, strict=True))
        return [self._known[one] for one in wanted]

    def _rank(self, wide: frozenset[str]) -> tuple[bool, float, float]:
        """The better of two measured sets is the lower."""
        best = self._known[wide]
        reached = self._goal.is_reached(best)
        return not reached, self._variants.share(wide) if reached else 0.0, -best.sqnr

    def _fits(self, wide: frozenset[str]) -> bool:
        most = self._goal.most_wide
        return most is None or self._variants.share(wide) <= most

    def _by_worth(
        self, names: Iterable[str], gains: Mapping[str, float], least: float
    ) -> list[str]:
        """Units by the noise that they take away, or make, for their weights; the most first."""

        def worth(name: str) -> float:
            return gains[name] / max(least, self._variants.share({name}))

        return sorted(sorted(names), key=worth, reverse=True)

    def _say(self, wide: frozenset[str]) -> None:
        best = self._known[wide]
        self._progress(f"{len(wide)} of {len(self._every)} wide: {best.sqnr:.1f} dB")

    def _grown(
        self, wide: frozenset[str], gains: Mapping[str, float], least: float
    ) -> frozenset[str]:
        """Make units wide until the goal is reached, or nothing more fits or gains.

        Args:
            wide: The units to begin with.
            gains: The noise that each unit takes away alone.
            least: The share of weights that a unit counts as at least.
        """
        gains = dict(gains)
        (best,) = self._measure([wide])
        while not self._goal.is_reached(best):
            fitting = [one for one in self._every - wide if self._fits(wide | {one})]
            chosen = self._by_worth(fitting, gains, least)[:_CANDIDATES]
            if not chosen:
                break
            self._say(wide)
            found = self._measure([wide | {one} for one in chosen])
            gains |= {one: _gain(best, new) for one, new in zip(chosen, found, strict=True)}
            name = self._by_worth(chosen, gains, least)[0]
            if self._goal.most_wide is not None and gains[name] <= 0:
                break
            wide, best = wide | {name}, self._known[wide | {name}]
        return wide

    def _filled(self, wide: frozenset[str], least: float) -> frozenset[str]:
        """Make units wide in the order of the noise that each makes alone; as `_grown`."""
        order = self._by_worth(self._every - wide, self._alone, least)
        if self._goal.most_wide is not None:
            for name in order:
                wide |= {name} if self._fits(wide | {name}) else set()
            self._measure([wide])
            return wide
        few, many = 0, len(order)
        while few < many:  # the smallest number that reaches the goal
            half = (few + many) // 2
            (one,) = self._measure([wide | set(order[:half])])
            few, many = (few, half) if self._goal.is_reached(one) else (half + 1, many)
        self._measure([wide | set(order[:few])])
        return wide | set(order[:few])

    def _exchanged(self, wide: frozenset[str]) -> frozenset[str]:
        """Make a unit wide, or one low and another wide, as long as that is better."""
        share = self._variants.share
        by_share = self._goal.most_wide is None
        if by_share and not self._goal.is_reached(self._known[wide]):
            return wide
        least = _LARGE * max(share({one}) for one in self._every)
        for _ in range(_ROUNDS):
            self._say(wide)
            large = [one for one in wide if share({one}) >= least]
            large = self._by_worth(large, self._alone, _LEAST[0])[-_CANDIDATES:]
            found = self._measure([wide - {one} for one in large])
            now = self._known[wide]
            lost = {one: _gain(less, now) for one, less in zip(large, found, strict=True)}
            out = self._by_worth(large, lost, least)[-_OUT:]
            low = self._every - wide
            into = [one for at in _LEAST for one in self._by_worth(low, self._alone, at)[:_IN]]
            sets = [less | {one} for less in (wide, *(wide - {one} for one in out)) for one in into]
            if by_share:
                sets = [one for one in sets if share(one) < share(wide)]
            sets = [one for one in dict.fromkeys(sets) if self._fits(one)]
            self._measure(sets)
            best = min((wide, *sets), key=self._rank)
            if best == wide:
                break
            wide = best
        return wide

    def _without_needless(self, wide: frozenset[str]) -> frozenset[str]:
        """Make units low again: several at once, in the end one by one."""
        by_share, best = self._goal.most_wide is None, self._known[wide].sqnr
        half = self._known[frozenset()].sqnr + 10 * math.log10(2)
        least = max(best - _NEEDLESS, half) if best >= half else best - _NEEDLESS

        def is_enough(one: Distance) -> bool:
            return self._goal.is_reached(one) if by_share else one.sqnr >= least > -math.inf

        while is_enough(self._known[wide]):
            found = self._measure([wide - {one} for one in sorted(wide)])
            good = [pair for pair in zip(sorted(wide), found, strict=True) if is_enough(pair[1])]
            good.sort(key=lambda p: -self._variants.share({p[0]}) if by_share else -p[1].sqnr)
            count = len(good)
            while count and not is_enough(self._measure([wide - {n for n, _ in good[:count]}])[0]):
                count //= 2
            if not count:
                break
            wide -= {name for name, _ in good[:count]}
        return wide


def _gain(before: Distance, after: Distance) -> float:
    """The noise that is taken away; 0 where there is no telling."""
    gain = before.noise - after.noise
    return 0.0 if math.isnan(gain) else gain
