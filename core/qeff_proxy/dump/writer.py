"""Write a dump while a model runs: every tensor of every step, at next to no cost.

`DumpWriter.step` is called once per part and step. Each tensor has one open file per phase, to
which the step's elements are appended; nothing is kept in memory but the index, and the steps that
a selection from the end (``last``) holds back. The dump is written in a fresh folder beside its
own and moved into place when it is complete, manifest last.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from qeff_proxy.common.atomic_folder import replaced_folder
from qeff_proxy.common.messages import counted
from qeff_proxy.dump.cache_rows import CONSTANT_INPUTS, cut_rows, locate_rows
from qeff_proxy.dump.format import FORMAT, MANIFEST, PHASES, VERSION, name_tensor, step_label
from qeff_proxy.dump.place import DUMPS, check_replaceable, write_error
from qeff_proxy.dump.selection import DumpOptions, StepSelection, matches_any
from qeff_proxy.dump.streams import TensorStream
from qeff_proxy.errors import DumpError, ProxyError
from qeff_proxy.tensor_names import ADAPTER, PAST, PRESENT, is_state

if TYPE_CHECKING:
    from qeff_proxy.dump.format import Direction, Phase

# Files kept open at a time; a model with more tensors opens the others for each record.
MAX_OPEN_FILES = 256


@dataclass
class _Record:
    stream: TensorStream
    tensor: NDArray[Any]
    true_dtype: str | None


@dataclass
class _Step:
    number: int
    phase: Phase
    index: int
    past_length: int | None = None
    records: list[_Record] = field(default_factory=list)


class DumpWriter:
    """A dump being written; use it as a context manager around the run.

    On success the dump appears at ``folder``, replacing an earlier dump there. On an exception
    nothing of it is left, and an earlier dump stays as it was. What a run that was killed left of a
    dump at the same place is put back or removed as this one begins.

    Args:
        folder: Where the complete dump will stand.
        provenance: What made it (model, plugin, backend, versions, seeds), as plain JSON values.
        options: Which steps, tensors and cache rows to keep.

    Raises:
        DumpError: The folder cannot be written, or holds something that is not a dump.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        options: DumpOptions | None = None,
    ) -> None:
        self._options = options if options is not None else DumpOptions()
        self._selection = StepSelection.parse(self._options.steps)
        self._provenance = _check_provenance(provenance)
        self._folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows a link
        check_replaceable(self._folder)
        self._streams: dict[tuple[Phase, str, Direction, str], TensorStream | None] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._parts: list[str] = []
        self._steps: list[dict[str, Any]] = []
        self._seen: set[tuple[str, int]] = set()
        self._held: deque[_Step] = deque()
        self._current: _Step | None = None
        self._open_files = 0
        self._state: Literal["open", "failed", "closed"] = "open"
        self._stage = replaced_folder(DUMPS, self._folder, MANIFEST)
        try:
            self._work = self._stage.__enter__()
        except OSError as error:
            raise write_error(self._folder, error) from error

    def __enter__(self) -> DumpWriter:
        return self

    def step(
        self,
        phase: Literal["prefill", "decode"],
        index: int,
        part: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        *,
        past_length: int | None = None,
        true_dtypes: Mapping[str, str] | None = None,
    ) -> None:
        """Write what went into and came out of one part in one step.

        The calls of one step (same ``phase`` and ``index``) follow one another, in the order in
        which the parts ran. The arrays may be reused as soon as the call returns.

        Args:
            phase: ``prefill`` (``index`` counts chunks) or ``decode`` (``index`` counts decode
                steps); both count from 0. A run without a cache is ``prefill`` 0.
            index: Of the step within its phase.
            part: Which part ran, such as ``body``.
            inputs: Graph input name to array of any shape; ml_dtypes arrays for bfloat16, float8.
            outputs: Graph output name to array.
            past_length: How many cache rows (axis 2 of ``past_key_values.*``) were valid before
                the step. Needed only where the cache has a fixed size; otherwise its shape says.
            true_dtypes: Graph tensor name to dtype, for arrays that carry bits, such as bfloat16
                in uint16.

        Raises:
            DumpError: The step cannot be written (the disk is full, a dtype is unknown, a step is
                written twice). The dump is then lost; an earlier one in its place is not.
        """
        if self._state != "open":
            raise DumpError(f"the dump {self._folder} is {self._state}; nothing can be added")
        try:
            step = self._begin(phase, index)
            if part not in self._parts:
                self._parts.append(part)
            if self._selection.held == 0 and not self._selection.keeps_old(step.number):
                return
            fresh = self._collect(step, part, inputs, outputs, past_length, true_dtypes or {})
            if self._selection.held == 0:
                self._write(step, fresh)
            else:
                step.records += [_Record(r.stream, r.tensor.copy(), r.true_dtype) for r in fresh]
        except OSError as error:
            self._discard("failed", error)
            raise write_error(self._folder, error) from error
        except ProxyError as error:
            self._discard("failed", error)
            raise

    def _begin(self, phase: Phase, index: int) -> _Step:
        current = self._current
        if current is not None and current.phase == phase and current.index == index:
            return current
        if phase not in PHASES or not isinstance(index, int) or index < 0:
            raise DumpError(f"{phase!r} {index!r} is not a step", "Use prefill or decode, from 0.")
        if (phase, index) in self._seen:
            raise DumpError(f"{step_label(phase, index)} was already written")
        step = self._current = _Step(len(self._seen), phase, index)
        self._seen.add((phase, index))
        if current is not None and current.phase != phase:
            self._close_files(current.phase)
        if self._selection.held:
            self._held.append(step)
            while len(self._held) > self._selection.held:
                old = self._held.popleft()
                if self._selection.keeps_old(old.number):
                    self._write(old, old.records)
        return step

    def _collect(
        self,
        step: _Step,
        part: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        past_length: int | None,
        true_dtypes: Mapping[str, str],
    ) -> list[_Record]:
        """Return the records to write for one part, cache outputs cut to their new rows."""
        records: list[_Record] = []
        rows: tuple[int, int] | None = None
        sides: tuple[tuple[Direction, Mapping[str, NDArray[Any]]], ...]
        sides = (("in", inputs), ("out", outputs))
        for direction, tensors in sides:
            for graph_name, tensor in tensors.items():
                key = (step.phase, part, direction, graph_name)
                if key not in self._streams:
                    self._streams[key] = self._open(key, outputs)
                stream = self._streams[key]
                if stream is None or stream.rows_of is not None:
                    continue
                if stream.delta:
                    if rows is None:
                        rows = locate_rows(graph_name, tensor, inputs, past_length)
                    tensor = cut_rows(graph_name, tensor, *rows)
                records.append(_Record(stream, tensor, true_dtypes.get(graph_name)))
        past = rows[0] if rows is not None else past_length
        if past is not None:
            if step.past_length not in (None, past):
                raise DumpError(
                    f"{step_label(step.phase, step.index)} has a past of "
                    f"{counted(step.past_length, 'row')} in one part and {past} in {part!r}"
                )
            step.past_length = past
        return records

    def _open(
        self, key: tuple[Phase, str, Direction, str], outputs: Mapping[str, NDArray[Any]]
    ) -> TensorStream | None:
        phase, part, direction, graph_name = key
        name = name_tensor(part, direction, graph_name)
        if not matches_any(str(name), self._options.tensors):
            return None
        if not graph_name.isprintable():
            raise DumpError(f"the graph tensor {graph_name!r} has a name that cannot be printed")
        # Some file systems do not tell upper case from lower case.
        other = self._names.setdefault((phase, str(name).casefold()), graph_name)
        if other != graph_name:
            raise DumpError(f"the graph tensors {other!r} and {graph_name!r} are both named {name}")
        stream = TensorStream(
            self._work, "decode" if phase == "decode" else "prefill", name, graph_name
        )
        if self._options.kv == "delta":
            grows = not is_state(graph_name)
            stream.delta = direction == "out" and graph_name.startswith(PRESENT) and grows
            fixed = graph_name.startswith(CONSTANT_INPUTS) or graph_name.endswith(ADAPTER)
            stream.constant = direction == "in" and fixed
            present = PRESENT + graph_name.removeprefix(PAST)
            if direction == "in" and graph_name.startswith(PAST) and present in outputs and grows:
                source = name_tensor(part, "out", present)
                if matches_any(str(source), self._options.tensors):
                    stream.rows_of = source
        return stream

    def _write(self, step: _Step, records: list[_Record]) -> None:
        if not self._steps or self._steps[-1]["number"] != step.number:
            self._steps.append({"number": step.number, "phase": step.phase, "index": step.index})
        self._steps[-1]["past_length"] = step.past_length
        position = len(self._steps) - 1
        for record in records:
            stream = record.stream
            is_open = stream.descriptor is not None
            keep = is_open or self._open_files < MAX_OPEN_FILES
            stream.append(position, step.index, record.tensor, record.true_dtype, keep)
            self._open_files += (stream.descriptor is not None) - is_open

    def _close_files(self, phase: str | None = None) -> None:
        for stream in self._streams.values():
            if stream is not None and phase in (None, stream.phase):
                self._open_files -= stream.descriptor is not None
                stream.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the dump in its place, or remove what was written when the run failed.

        Raises:
            DumpError: The dump cannot be completed, or is empty.
        """
        if self._state == "failed" and error is None:
            raise DumpError(f"the dump {self._folder} failed while it was written, and is lost")
        if self._state != "open":
            return
        if error is not None:
            self._discard("closed", error)
            return
        try:
            self._finish()
            check_replaceable(self._folder)
            self._stage.__exit__(None, None, None)
        except OSError as problem:
            self._discard("failed", problem)
            raise write_error(self._folder, problem) from problem
        except BaseException as problem:
            self._discard("failed", problem)
            raise
        self._state = "closed"

    def _finish(self) -> None:
        for step in self._held:
            if self._selection.keeps_last(step.number, len(self._seen)):
                self._write(step, step.records)
        streams = [s for s in self._streams.values() if s is not None]
        written = [s for s in streams if s.started]
        if not written:
            raise DumpError(
                f"nothing was dumped: {counted(len(self._seen), 'step')} ran, and none of "
                f"their tensors is selected by steps={self._options.steps!r}, "
                f"tensors={self._options.tensors}"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "byte_order": "little",
            "provenance": self._provenance,
            "options": {
                "steps": self._options.steps,
                "tensors": list(self._options.tensors),
                "kv": self._options.kv,
            },
            "parts": self._parts,
            "steps": self._steps,
            "omitted": [
                {"name": str(s.name), "phase": s.phase, "rows_of": str(s.rows_of)}
                for s in streams
                if s.rows_of is not None
            ],
            "tensors": [stream.finish() for stream in written],
        }
        (self._work / MANIFEST).write_text(_one_entry_a_line(manifest), encoding="utf-8")

    def _discard(self, state: Literal["failed", "closed"], error: BaseException) -> None:
        self._state = state
        self._held.clear()
        self._close_files()
        self._stage.__exit__(type(error), error, error.__traceback__)


def _one_entry_a_line(manifest: dict[str, Any]) -> str:
    """Return JSON with one step or tensor a line: to be read, and to be searched with grep."""
    lines = []
    for key, value in manifest.items():
        if key in ("steps", "tensors", "omitted") and value:
            items = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            lines.append(f'"{key}": [\n  {items}\n ]')
        else:
            lines.append(f'"{key}": {json.dumps(value, allow_nan=False)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _check_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(dict(provenance), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DumpError(f"the provenance is not plain JSON: {error}") from error
    value: dict[str, Any] = json.loads(text)
    return value
