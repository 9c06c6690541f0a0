"""The tensors of one part of a dump, by the graph's names; their shapes without reading them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import Direction, Phase, TensorName
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.dump.reader import Dump
from qeff_proxy.errors import DumpError


def choose_parts(dump: Dump, parts: list[str] | None) -> list[str]:
    """The parts to pack: those asked for, the only one, or ``body``.

    Raises:
        DumpError: There is no such part, or it must be said which.
    """
    known = dump.manifest.parts
    chosen = parts or (known if len(known) == 1 else ["body"])
    for part in chosen:
        if part not in known:
            raise DumpError(
                f"{dump.folder} has no part {part!r}", f"Choose one of {', '.join(known)}."
            )
    return list(dict.fromkeys(chosen))


class PartSource:
    """One part of a dump.

    Args:
        dump: The dump.
        part: Which part of it.

    Raises:
        DumpError: None of its tensors was dumped.
    """

    def __init__(self, dump: Dump, part: str) -> None:
        self.dump = dump
        self.part = part
        self._positions = {(s.phase, s.index): i for i, s in enumerate(dump.steps)}
        self._names: dict[tuple[Phase, Direction], dict[str, TensorName]] = {}
        for (phase, name), tensor in dump.tensors.items():
            if name.part == part:
                known = self._names.setdefault((phase, name.direction), {})
                known[tensor.index.graph_name] = name
        self._rows_of = {
            (omitted.phase, omitted.name): omitted.rows_of
            for omitted in dump.omitted
            if omitted.name.part == part
        }
        for (phase, name), rows_of in self._rows_of.items():
            rows = dump.tensors.get((phase, rows_of))
            if rows is not None:
                graph = rows.index.graph_name.replace("present.", "past_key_values.", 1)
                self._names.setdefault((phase, "in"), {})[graph] = name
        if not self._names:
            have = sorted({name.part for _, name in dump.tensors})
            raise DumpError(
                f"{dump.folder} holds no tensor of the {part} part",
                f"Choose a part of which it does: {', '.join(have)}.",
            )

    def steps(self) -> list[StepInfo]:
        """The steps in which the part has tensors."""
        return [
            step
            for step in self.dump.steps
            if any(self.names(step, side) for side in ("in", "out"))
        ]

    def names(self, step: StepInfo, direction: Direction) -> list[str]:
        """The graph's names of the inputs or outputs that were dumped in a step."""
        names = self._names.get((step.phase, direction), {})
        return [name for name in names if self._record(step, names[name]) is not None]

    def _record(self, step: StepInfo, name: TensorName) -> int | None:
        """The number of a step's record in the tensor's file, or in that of its rows."""
        rows_of = self._rows_of.get((step.phase, name))
        tensor = self.dump.tensors.get((step.phase, rows_of or name))
        if tensor is None:
            return None
        position = self._positions[step.phase, step.index]
        record = int(np.searchsorted(tensor.index.positions, position))
        fits = record < len(tensor) and tensor.index.positions[record] == position
        return record if fits else None

    def shape_and_dtype(
        self, step: StepInfo, direction: Direction, graph_name: str
    ) -> tuple[tuple[int, ...], str]:
        """What `array` has, without reading it."""
        name = self._names[step.phase, direction][graph_name]
        rows_of = self._rows_of.get((step.phase, name))
        index = self.dump.tensors[step.phase, rows_of or name].index
        record = self._record(step, name)
        assert record is not None  # noqa: S101 - the callers ask for names of `names`
        shape = list(index.record_shape(record))
        if rows_of is not None:
            shape[CACHE_AXIS] = step.past_length or 0
        elif index.delta:
            shape[CACHE_AXIS] += step.past_length or 0
        return tuple(shape), index.dtype

    def array(self, step: StepInfo, direction: Direction, graph_name: str) -> NDArray[Any]:
        """A whole tensor of one step, in its true dtype.

        Raises:
            DumpError: It is damaged, or rows of the cache were not dumped.
        """
        name = self._names[step.phase, direction][graph_name]
        return self.dump.array(step.phase, step.index, name)
