"""Make a dump of files that a tool wrote by itself, without an index of ours.

Which step a run is must stand in the files' paths, or be said; it is never counted. With a dump of
the same run, outputs get its names, and padding of caches is cut to its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from qeff_proxy.common.messages import counted
from qeff_proxy.device.cache_of_step import is_cache, with_rows
from qeff_proxy.device.conventions import Conventions, Rows, pick
from qeff_proxy.device.index import PackedRun, PackedTensor
from qeff_proxy.device.part_source import PartSource
from qeff_proxy.device.target import Found, Recorded, Target, map_raw, raw_size
from qeff_proxy.device.unpack_outputs import (
    Unpacked,
    check_any,
    check_output,
    counted_result,
    decode,
    match_files,
    raw_dtype,
)
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.dump.format import DTYPES, Phase, step_label
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.dump.reader import Dump
from qeff_proxy.dump.selection import DumpOptions
from qeff_proxy.dump.writer import DumpWriter
from qeff_proxy.errors import DumpError, UsageError


def import_recorded(
    path: Path,
    target: Target,
    output: Path,
    *,
    like: Dump | None = None,
    part: str | None = None,
    steps: Sequence[str] = (),
    conventions: Conventions | None = None,
) -> Unpacked:
    """Make a dump of a tool's own files.

    Args:
        path: The file or folder.
        target: The tool.
        output: The new dump.
        like: A dump of the same run. Without it, all that the files hold is dumped under their
            names, and steps that the paths do not tell are prefill.
        part: The part that ran; ``body`` unless given or told by ``like``.
        steps: Which step each run is, such as ``decode-0000``, in the order of the runs.
        conventions: Dtypes, layouts, scales, names, and where a cache's valid rows lie.

    Raises:
        DumpError: A file is damaged, or may be of several tensors or steps.
        UsageError: An option cannot be right.
    """
    conventions = conventions or Conventions()
    recorded = list(target.find_recorded(path))
    if not recorded:
        raise DumpError(f"{path} holds no runs")
    labels = _labels(recorded, steps, like, path)
    result = Unpacked(output)
    if like is None:
        files = {file.name for run in recorded for file in (*run.inputs, *run.outputs)}
        conventions.check_used(sorted(files))
        _write_all(recorded, labels, part or "body", target, conventions, output)
        return counted_result(result)
    check_output(output, like)
    if conventions.rows == "whole" and target.rows == "front":
        conventions = replace(conventions, rows="front")
    names = [part] if part is not None else like.manifest.parts
    sources = [PartSource(like, name) for name in names if _has_tensors(like, name)]
    known = {t.index.graph_name for (_, n), t in like.tensors.items() if n.direction == "out"}
    conventions.check_used(sorted(known))
    provenance = {**like.provenance, "backend": target.name, "versions": {}, "options": {}}
    runs = dict(zip(labels, recorded, strict=True))
    with DumpWriter(output, provenance, DumpOptions(tensors="*.out.*", kv="full")) as writer:
        for step in like.steps:
            run = runs.pop((step.phase, step.index), None)
            if run is None:
                result.missing.append(step.label)
                continue
            _write_like(writer, run, step, sources, conventions, result)
        if runs:
            label = step_label(*next(iter(runs)))
            raise DumpError(f"{path} has {label}, and {like.folder} has no such step")
        check_any(result, path)
    return counted_result(result)


def _has_tensors(like: Dump, part: str) -> bool:
    return any(name.part == part for _, name in like.tensors)


def _labels(
    recorded: list[Recorded], steps: Sequence[str], like: Dump | None, path: Path
) -> list[tuple[Phase, int]]:
    """The step of each run."""
    if steps:
        if len(steps) != len(recorded):
            raise UsageError(
                f"--steps names {counted(len(steps), 'step')}, and {path} holds "
                f"{counted(len(recorded), 'run')}"
            )
        labels = [_parse_label(text) for text in steps]
    else:
        labels = [_label(run, like, path) for run in recorded]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DumpError(f"{path} holds {step_label(*twice)} twice", "Say which is which: --steps.")
    return labels


def _parse_label(text: str) -> tuple[Phase, int]:
    phase, _, index = text.strip().partition("-")
    if phase not in ("prefill", "decode") or not index.isdecimal():
        raise UsageError(f"--steps {text} is no step", "Such as prefill-0000,decode-0000.")
    return ("prefill" if phase == "prefill" else "decode"), int(index)


def _label(run: Recorded, like: Dump | None, path: Path) -> tuple[Phase, int]:
    if run.phase is not None and run.index is not None:
        return run.phase, run.index
    if like is None:
        return run.phase or "prefill", run.number
    fits = [step for step in like.steps if run.phase in (None, step.phase)]
    if run.phase is not None and fits:  # tools that do not number it write a prompt's last chunk
        return fits[-1].phase, fits[-1].index
    if len(like.steps) == 1:
        return like.steps[0].phase, like.steps[0].index
    raise DumpError(
        f"the files of {path} do not say which of the {len(like.steps)} steps of {like.folder} "
        f"run {run.number} is",
        f"Say it: --steps {','.join(step.label for step in like.steps[:3])},…",
    )


def _write_like(
    writer: DumpWriter,
    recorded: Recorded,
    step: StepInfo,
    sources: list[PartSource],
    conventions: Conventions,
    result: Unpacked,
) -> None:
    """Write the outputs of one step that the reference has."""
    parts: dict[str, str] = {}
    tensors: dict[str, PackedTensor] = {}
    twice: set[str] = set()
    for source in sources:
        for name in source.names(step, "out"):
            shape, dtype = source.shape_and_dtype(step, "out", name)
            valid = tuple((0, size) for size in shape)
            axes = conventions.axes(name, len(shape))
            twice |= {name} & parts.keys()
            parts[name] = source.part
            tensors[name] = PackedTensor(name, dtype, shape, valid, axes)
    run = PackedRun(
        "any", step.phase, step.index, step.past_length, "any", (), tuple(tensors.values())
    )
    matched = match_files(recorded.outputs, run, conventions, result)
    for name in twice & matched.keys():
        raise DumpError(
            f"{matched[name].where} may be {name} of several parts",
            "Say which ran: --part PART.",
        )
    result.steps += bool(matched)
    part_names = {parts[name] for name in matched}
    result.missing += [
        f"{name} in {step.label} of {parts[name]}"
        for name in tensors
        if name not in matched and parts[name] in part_names
    ]
    for name, file in matched.items():
        tensor = _with_rows(tensors[name], file, conventions.rows)
        array = decode(file, tensor, run, replace(conventions, rows="whole"))
        past = step.past_length
        writer.step(step.phase, step.index, parts[name], {}, {name: array}, past_length=past)


def _with_rows(tensor: PackedTensor, file: Found, rows: Rows) -> PackedTensor:
    """The tensor with the padding that its file has, if it is a cache."""
    if rows not in ("front", "back") or not is_cache(tensor) or file.shape is None:
        return tensor
    axes = tensor.axes if tensor.axes is not None else tuple(range(len(tensor.shape)))
    total = dict(zip(axes, file.shape, strict=False)).get(CACHE_AXIS, 0)
    return tensor if total < tensor.shape[CACHE_AXIS] else with_rows(tensor, total, rows)


def _write_all(
    recorded: list[Recorded],
    labels: list[tuple[Phase, int]],
    part: str,
    target: Target,
    conventions: Conventions,
    output: Path,
) -> None:
    """Write all that the files hold, under their own names."""
    provenance = {"converted_from": target.name}
    with DumpWriter(output, provenance, DumpOptions(kv="full")) as writer:
        for run, (phase, index) in zip(recorded, labels, strict=True):
            for number, files in enumerate((run.inputs, run.outputs)):
                for file in files:
                    array = _as_said(file, conventions)
                    sides = ({file.name: array}, {}) if number == 0 else ({}, {file.name: array})
                    writer.step(phase, index, part, *sides)


def _as_said(file: Found, conventions: Conventions) -> np.ndarray:
    if file.load is not None:
        return file.load()
    assert file.raw is not None  # noqa: S101 - a file holds one or the other
    dtype = raw_dtype(file, pick(conventions.dtypes, file.name), None)
    itemsize = DTYPES[dtype].itemsize
    shape = file.shape if file.shape is not None else (raw_size(file.raw) // itemsize,)
    if prod(shape) * itemsize != raw_size(file.raw):
        raise DumpError(
            f"{file.where} has {counted(raw_size(file.raw), 'byte')}, not those of {list(shape)} "
            f"elements of {dtype}"
        )
    return map_raw(file.raw, dtype, shape)
