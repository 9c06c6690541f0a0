"""What changed between two nights of a ledger, by cell and, where numbers moved, by layer.

A night is a run of a sweep; runs of one name, such as the shards of a matrix, are one night. The
state of a cell in a night is its latest record until then, of the identity that it had that night.

Errors and times are compared with the cell's own history: its band is the median of earlier nights,
plus or minus five times their median deviation, but at least a floor. With fewer than three nights
there is only a factor.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from qeff_proxy.compare.verdict import format_share
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep.fingerprint import distance
from qeff_proxy.sweep.ledger import Ledger, Record

Kind = Literal["verdict", "refused", "divergence", "numbers", "time", "missing", "not run", "new"]

_REMEMBERED = 30  # nights of a cell that its bands are made of
_DEVIATIONS = 5
_MOVED = 1e-3  # distance of two fingerprints of a tensor, over its norm
_LOOKED_UP = 200  # changes that fingerprints are read for
_NONE = 1e-12  # of peak; smaller errors count as this


class _Width(NamedTuple):
    """The least width of a band, and its width with fewer than three nights, as factors."""

    floor: float
    few: float


_ERROR, _TIME, _SPEED = _Width(1.25, 2.0), _Width(1.5, 2.0), _Width(1.1, 1.3)
_LEAST_SECONDS = 1.0  # a run is not slower by less


@dataclass(frozen=True)
class Change:
    """One change of a cell.

    Attributes:
        name: Of the cell.
        kind: What changed.
        worse: Whether it got worse.
        what: In one line.
        at: The part and layer that it is about, where there is one.
        before: The record of the earlier night, if any.
        after: That of the later night.
    """

    name: str
    kind: Kind
    worse: bool
    what: str
    at: str | None = None
    before: Record | None = None
    after: Record | None = None

    @property
    def better(self) -> bool:
        """Whether the cell passes now and did not get worse."""
        return not self.worse and self.after is not None and self.after.verdict == "passed"


@dataclass(frozen=True)
class NightComparison:
    """Two nights of a ledger.

    Attributes:
        ledger: Its file.
        before: The earlier night; ``None`` where there is only one.
        after: The later one.
        records: Of the later night, by cell; ``None`` for a cell without a result.
        history: All records of each of these cells until then, the oldest first.
        changes: In the order of the plan.
    """

    ledger: Path
    before: str | None
    after: str
    records: dict[str, Record | None]
    history: dict[str, list[Record]]
    changes: list[Change]

    @property
    def worse(self) -> bool:
        """Whether something got worse."""
        return any(change.worse for change in self.changes)


def compare_nights(path: str | Path, nights: tuple[str, str] | None = None) -> NightComparison:
    """Compare two nights of a ledger.

    Args:
        path: The ledger's file.
        nights: Their names; by default the last, and the one before it of the same plan.

    Raises:
        UsageError: There is no such ledger or night.
    """
    history = _History(Path(path), nights)
    before, after = history.nights
    records = {name: history.state(name, after) for name in history.cells[after]}
    changes: list[Change] = []
    if before is not None:
        for name in dict.fromkeys([*history.cells[after], *history.cells[before]]):
            changes += _changes_of(name, history, before, after)
        changes = with_layers(changes, history.ledger)
    past = {name: history.of(name, after) for name in records}
    return NightComparison(Path(path), before, after, records, past, changes)


class _History:
    """A ledger in memory, without its fingerprints."""

    def __init__(self, path: Path, nights: tuple[str, str] | None) -> None:
        if not path.is_file():
            raise UsageError(f"there is no ledger {path}", "A sweep writes it.")
        self.ledger = Ledger(path)
        self.cells: dict[str, dict[str, str]] = {}
        self.chosen: dict[str, set[str]] = {}
        self._ids: dict[str, dict[str, None]] = {}
        plans: dict[str, str] = {}
        for night in self.ledger.new_nights():
            chosen = self.chosen.setdefault(night.night, set())
            chosen.update(set(night.cells).difference(night.left_out))
            self.cells.setdefault(night.night, {}).update(night.cells)
            plans[night.night] = night.plan
            for name, identity in night.cells.items():
                self._ids.setdefault(name, {})[identity] = None
        if not self.cells:
            raise UsageError(f"{path} has no nights", "Keep the .nights.jsonl file beside it.")
        *earlier, last = self.cells
        same = [night for night in earlier if plans[night] == plans[last]]
        self.nights: tuple[str | None, str] = nights or (same[-1] if same else None, last)
        for each in self.nights:
            if each is not None and each not in self.cells:
                known = ", ".join([*self.cells][-5:])
                raise UsageError(f"{path} has no night {each!r}", f"The last ones are {known}.")
        self._order = {night: place for place, night in enumerate(self.cells)}
        self._read_records(max(self._order[each] for each in self.nights if each is not None))

    def _read_records(self, last: int) -> None:
        """Read the records until a night; of older ones, not the layers, which are most of it."""
        self._records: dict[str, list[Record]] = {}
        recent: dict[str, deque[tuple[list[Record], int]]] = {}
        for record in self.ledger.new_records():
            if self._order.get(record.night, -1) > last:
                continue
            records = self._records.setdefault(record.id, [])
            records.append(record)
            queue = recent.setdefault(record.name, deque())
            queue.append((records, len(records) - 1))
            if len(queue) > _REMEMBERED + 1:
                older, place = queue.popleft()
                older[place] = msgspec.structs.replace(older[place], layers=[])

    def state(self, name: str, night: str) -> Record | None:
        """What was known of a cell after a night."""
        until = self._until(self._records.get(self.cells[night][name], ()), night)
        return until[-1] if until else None

    def of(self, name: str, night: str) -> list[Record]:
        """All records of a cell until a night."""
        every = [r for identity in self._ids[name] for r in self._records.get(identity, ())]
        return sorted(self._until(every, night), key=lambda record: record.time)

    def _until(self, records: Iterable[Record], night: str) -> list[Record]:
        last = self._order[night]
        return [record for record in records if self._order.get(record.night, -1) <= last]


def _changes_of(name: str, history: _History, first: str, second: str) -> list[Change]:
    """How a cell changed."""
    if name not in history.cells[second]:
        return [Change(name, "missing", True, f"it is not in {second}")]
    after = history.state(name, second)
    before = history.state(name, first) if name in history.cells[first] else None
    if after is None:
        if name not in history.chosen[second]:
            return []
        return [Change(name, "not run", True, "it has no result yet", before=before)]
    if before is None:
        return [Change(name, "new", False, f"new: {_told(after)}", after=after)]
    if before is after or (before.id, before.time) == (after.id, after.time):
        return []
    versions = _versions_between(before, after)
    changes = []
    if before.verdict != after.verdict:
        changes.append(describe_turn(before, after, versions))
    elif before.divergence != after.divergence and after.divergence is not None:
        what = f"the first divergence moved from {before.divergence or 'no place'} to "
        earlier = _depth(after) < _depth(before)
        what += f"{after.divergence}{versions}"
        changes.append(Change(name, "divergence", earlier, what, _place(after), before, after))
    past = [record for record in history.of(name, second) if record.time < after.time]
    past = [record for record in past[-_REMEMBERED:] if record.layers or record.error is not None]
    if not changes and past and after.verdict == "passed":
        changes += _numbers(name, past, before, after, versions)
    if past and after.verdict == before.verdict == "passed":
        changes += _times(name, past, before, after, versions)
    return changes


def describe_turn(before: Record, after: Record, versions: str) -> Change:
    """The change of a verdict."""
    ran = before.verdict in ("passed", "failed")
    kind: Kind = "refused" if ran and after.verdict not in ("passed", "failed") else "verdict"
    worse = after.verdict != "passed" and (ran or before.verdict == "passed")
    what = f"{before.verdict} became {_told(after)}{versions}"
    return Change(after.name, kind, worse, what, _place(after), before, after)


def _numbers(
    name: str, past: Sequence[Record], before: Record, after: Record, versions: str
) -> list[Change]:
    """Whether the error of the cell, or of one of its layers, left its band."""
    layers: dict[str, list[float]] = {}
    for record in past:
        for layer in record.layers:
            layers.setdefault(layer.at, []).append(layer.error or 0.0)
    series = [(layer.at, layers.get(layer.at, []), layer.error) for layer in after.layers]
    series.append((after.worst or "the output", [r.error or 0.0 for r in past], after.error))
    out = [(at, _outside(values, now or 0.0, _ERROR), now or 0.0) for at, values, now in series]
    for sign, word in ((1, "above"), (-1, "below")):
        at, band, now = next((one for one in out if one[1] and one[1][0] == sign), (None, None, 0))
        if at is not None and band is not None:
            usual = format_share(band[1])
            what = f"the error of {at} is {format_share(now)} of peak, {word} its usual {usual}"
            return [Change(name, "numbers", sign > 0, what + versions, at, before, after)]
    return []


def _times(
    name: str, past: Sequence[Record], before: Record, after: Record, versions: str
) -> list[Change]:
    """Whether the time of a run, or the speed where it was measured, left its band."""
    speeds = [record.speed for record in past if record.speed is not None]
    if after.speed is not None and speeds:
        side = _outside(speeds, after.speed, _SPEED)
        text = f"{after.speed:.4g} a second"
    else:
        times = [seconds for record in past if (seconds := _run_seconds(record)) is not None]
        now = _run_seconds(after)
        if now is None or not times:
            return []
        side = _outside(times, now, _TIME)
        text = f"{now:.2f} s"
        if side is not None:
            side = (-side[0], side[1]) if abs(now - side[1]) >= _LEAST_SECONDS else None
    if side is None:
        return []
    word = "slower" if side[0] < 0 else "faster"
    what = f"it runs {word}: {text}, usually {side[1]:.4g}{versions}"
    return [Change(name, "time", side[0] < 0, what, None, before, after)]


def _outside(values: Sequence[float], now: float, width: _Width) -> tuple[int, float] | None:
    """1 above the band, -1 below it, with the median; ``None`` inside, or without values."""
    if not values:
        return None
    logs = [math.log(max(value, _NONE)) for value in values]
    median = statistics.median(logs)
    half = math.log(width.few)
    if len(logs) >= 3:
        deviation = statistics.median(abs(value - median) for value in logs)
        half = max(math.log(width.floor), _DEVIATIONS * deviation)
    apart = math.log(max(now, _NONE)) - median
    if abs(apart) <= half:
        return None
    return (1 if apart > 0 else -1), math.exp(median)


def with_layers(changes: list[Change], *ledgers: Ledger) -> list[Change]:
    """Add, from the fingerprints in the ledgers, the first tensor whose values moved."""
    changed = [each for each in changes if each.before and each.after and each.kind != "time"]
    ids = {r.id for each in changed[:_LOOKED_UP] for r in (each.before, each.after) if r}
    prints = {place: each for one in ledgers for place, each in one.fingerprints(ids).items()}
    result = []
    for change in changes:
        moved = None
        if change in changed and change.before is not None and change.after is not None:
            one, other = (
                prints.get((record.id, record.night), {})
                for record in (change.before, change.after)
            )
            order = sorted(other, key=lambda tensor: ".layer-" not in tensor)
            apart = ((tensor, distance(one, other, tensor)) for tensor in order)
            moved = next(((t, far) for t, far in apart if far is not None and far > _MOVED), None)
        if moved is not None:
            told = f"; its values first moved at {moved[0]}, by {format_share(moved[1])}"
            change = Change(**{**vars(change), "what": change.what + told})
        result.append(change)
    return result


def _told(record: Record) -> str:
    """A verdict with its reason."""
    if record.divergence is not None:
        return f"{record.verdict}, first at {record.divergence}"
    return f"{record.verdict}: {record.reason}" if record.reason else record.verdict


def _place(record: Record) -> str | None:
    first = record.divergence
    if first is None:
        return None
    return first.part if first.layer is None else f"{first.part} layer {first.layer}"


def _depth(record: Record) -> tuple[bool, float]:
    first = record.divergence
    return (
        (True, 0.0)
        if first is None
        else (
            False,
            math.inf if first.layer is None else first.layer,
        )
    )


def _run_seconds(record: Record) -> float | None:
    runs = [s for stage, s in record.seconds.items() if stage.startswith("running ")]
    return runs[-1] if runs else None


def _versions_between(before: Record, after: Record) -> str:
    """What else differs between two records: versions, settings and options."""
    one, other = ({**r.versions, **r.setting, **r.options} for r in (before, after))
    changed = [
        f"{name} {one.get(name, 'none')} → {other.get(name, 'none')}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    return f" ({', '.join(changed)})" if changed else ""
