"""``aic_batch_io.json`` and ``.raw`` files, as QEfficient writes and ``qaic-runner`` reads them.

The JSON is ``{"IO-files": [[{"path", "io-direction", "elem-size", "map-to", "dims"}, …], …]}``, one
inner list per run of the graph, paths relative to the JSON. It names no dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qeff_proxy.common.messages import counted
from qeff_proxy.dump.convert.common import (
    ConversionSource,
    StepArrays,
    new_folder,
    read_limited,
    write_steps,
)
from qeff_proxy.dump.format import DTYPES, Direction, Phase, as_values
from qeff_proxy.dump.rules import parse_json
from qeff_proxy.errors import DumpError

JSON_NAME = "aic_batch_io.json"
# What QEfficient calls the cache -> what the graphs here call it.
_CACHE = re.compile(r"past_(key|value)\.(\d+)(_RetainedState)?\Z")
_STEP = re.compile(r"(prefill|decode)(?:-(\d{1,9}))?\Z")


def export_dump(source: ConversionSource, folder: Path) -> Path:
    """Write one part of a dump for the Qualcomm tools.

    Args:
        source: The part.
        folder: New or empty; ``aic_batch_io.json`` and a folder of ``.raw`` files per step.

    Returns:
        The path of the JSON.

    Raises:
        DumpError: The folder cannot be written, or the dump is damaged.
    """
    sets: list[list[dict[str, Any]]] = []
    with new_folder(folder) as work:
        for step in source.steps():
            entries: list[dict[str, Any]] = []
            (work / step.label).mkdir()
            sides: tuple[Direction, ...] = ("in", "out")
            for side in sides:
                for graph_name, array in source.arrays(step, side):
                    path = f"{step.label}/{_file_name(graph_name)}.raw"
                    if any(entry["path"] == path for entry in entries):
                        raise DumpError(f"two tensors of {step.label} would be written to {path}")
                    (work / path).write_bytes(np.ascontiguousarray(array).tobytes())
                    entries.append(
                        {
                            "path": path,
                            "io-direction": side,
                            "elem-size": array.dtype.itemsize,
                            "map-to": graph_name,
                            "dims": list(array.shape),
                        }
                    )
            sets.append(entries)
        (work / JSON_NAME).write_text(
            json.dumps({"IO-files": sets}, indent=1) + "\n", encoding="utf-8"
        )
    return folder / JSON_NAME


def _file_name(graph_name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", graph_name).lstrip(".")


def import_dump(
    path: Path,
    folder: Path,
    *,
    like: ConversionSource | None = None,
    part: str | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Make a dump of what an ``aic_batch_io.json`` lists.

    QEfficient's ``past_key.0`` and ``past_key.0_RetainedState`` become ``past_key_values.0.key``
    and ``present.0.key``. QEfficient writes every prefill chunk to the same files; a run whose
    files a later run wrote again is left out.

    Args:
        path: The JSON, or its folder.
        folder: Of the new dump.
        like: A dump of the same run, for the steps' names and the tensors' dtypes.
        part: The part's name in the new dump.
        dtypes: Globs over graph names to dtypes. Without either, 2 bytes are float16, 4 float32
            (int32 for names that end in ``_ids`` or ``_index``), 8 int64, and 1 int8.

    Raises:
        DumpError: The JSON or a file is not what it should be, or lies outside of the folder.
    """
    file = path / JSON_NAME if path.is_dir() else path
    root = file.parent
    value = parse_json(read_limited(file, root), file)
    sets = value.get("IO-files") if isinstance(value, dict) else None
    if not isinstance(sets, list) or not all(isinstance(s, list) and s for s in sets):
        raise DumpError(f"{file} has no list of IO-files")
    for entries in sets:
        for entry in entries:
            _check_entry(entry, file)
    last = {entry["path"]: number for number, s in enumerate(sets) for entry in s}
    kept = [s for n, s in enumerate(sets) if all(last[entry["path"]] == n for entry in s)]

    def steps() -> Iterator[StepArrays]:
        for entries in kept:
            sides: dict[str, dict[str, NDArray[Any]]] = {"in": {}, "out": {}}
            for entry in entries:
                name = _graph_name(entry["map-to"])
                side = sides[entry["io-direction"]]
                if name in side:
                    raise DumpError(f"{file} has {name!r} twice in one run")
                side[name] = _read_raw(entry, name, root, like, dtypes or {})
            yield StepArrays(sides["in"], sides["out"])

    write_steps(
        folder,
        steps(),
        {"converted_from": "aic_batch_io.json"},
        like=like,
        part=part,
        labels=_labels(kept),
    )


def _check_entry(entry: Any, file: Path) -> None:
    fields = {"path": str, "io-direction": str, "elem-size": int, "map-to": str}
    if not isinstance(entry, dict) or any(
        type(entry.get(key)) is not kind for key, kind in fields.items()
    ):
        raise DumpError(f"an entry of {file} lacks one of {', '.join(fields)}")
    if entry["io-direction"] not in ("in", "out"):
        raise DumpError(f"{file} has the direction {entry['io-direction']!r}")
    dims = entry.get("dims")
    if dims is not None and not (
        isinstance(dims, list) and all(type(n) is int and 0 <= n < 2**48 for n in dims)
    ):
        raise DumpError(f"the dims of {entry['map-to']!r} in {file} are not a shape")


def _graph_name(name: str) -> str:
    match = _CACHE.match(name)
    if match is None:
        return name
    return f"{'present' if match[3] else 'past_key_values'}.{match[2]}.{match[1]}"


def _labels(sets: list[list[dict[str, Any]]]) -> list[tuple[Phase, int]] | None:
    """Return the steps that the folders' names tell, or None."""
    labels: list[tuple[Phase, int]] = []
    counts = {"prefill": 0, "decode": 0}
    for entries in sets:
        match = _STEP.match(Path(entries[0]["path"]).parent.name)
        if match is None:
            return None
        index = counts[match[1]] if match[2] is None else int(match[2])
        counts[match[1]] = index + 1
        labels.append(("prefill" if match[1] == "prefill" else "decode", index))
    return labels if len(set(labels)) == len(labels) else None


def _read_raw(
    entry: dict[str, Any],
    name: str,
    root: Path,
    like: ConversionSource | None,
    dtypes: Mapping[str, str],
) -> NDArray[Any]:
    size = entry["elem-size"]
    told = [dtype for glob, dtype in dtypes.items() if fnmatchcase(name, glob)]
    known = like.dtype(name) if like is not None else None
    if told:
        dtype = told[-1]
    elif known is not None and DTYPES[known].itemsize == size:
        dtype = known
    else:
        integer = name.endswith(("_ids", "_index"))
        dtype = {1: "int8", 2: "float16", 4: "int32" if integer else "float32", 8: "int64"}.get(
            size, "?"
        )
    info = DTYPES.get(dtype)
    if info is None or info.itemsize != size:
        raise DumpError(f"{name!r} has elements of {counted(size, 'byte')}, which are not {dtype}")
    data = read_limited(root / entry["path"], root)
    shape = entry.get("dims")
    if shape is None:
        shape = [len(data) // size]
    if math.prod(shape) * size != len(data):
        raise DumpError(
            f"{entry['path']} has {counted(len(data), 'byte')}, not those of {shape} "
            f"elements of {counted(size, 'byte')}"
        )
    return as_values(np.frombuffer(data, info.stored).reshape(shape), dtype)
