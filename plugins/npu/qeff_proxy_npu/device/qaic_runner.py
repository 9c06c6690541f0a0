"""``aic_batch_io.json`` and raw files, as QEfficient writes and ``qaic-runner`` reads them.

The JSON is ``{"IO-files": [[{"path", "io-direction", "elem-size", "map-to", "dims"}, …], …]}``, one
inner list per run of the graph, paths relative to the JSON. It names no dtype. ``qaic-runner``
writes ``<tensor>-activation-<set>-inf-<run>.bin``.

QEfficient's ``write_io`` names its folders ``prefill`` and ``decode``: the prompt's last chunk, and
the first decode step. It calls the caches ``past_key.0`` and ``past_key.0_RetainedState``, and
writes them whole: the valid rows first.

Sources: ``write_io_files`` in ``QEfficient/generation/text_generation_inference.py`` of
quic/efficient-transformers; ``qaic-runner``'s command lines in that repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qeff_proxy.device.foreign import read_limited
from qeff_proxy.device.index import PackedRun, PackedTensor
from qeff_proxy.device.target import (
    Found,
    Group,
    Reader,
    Recorded,
    Target,
    check_within,
    input_path,
    prepare,
    quoted,
    raw_files,
    write_raw,
)
from qeff_proxy.dump.format import DTYPES, Direction, Phase
from qeff_proxy.dump.rules import parse_json
from qeff_proxy.errors import DumpError

JSON_NAME = "aic_batch_io.json"
# What QEfficient calls the cache -> what the graphs here call it.
_CACHE = re.compile(r"past_(key|value)\.(\d+)(_RetainedState)?\Z")
_STEP = re.compile(r"(prefill|decode)(?:-(\d{1,9}))?\Z")
_ACTIVATION = re.compile(r"-activation-\d+-inf-\d+\Z")


class QaicRunnerTarget(Target):
    """``qaic-runner``."""

    name = "qaic-runner"
    carries_cache = True
    rows = "front"

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write each run's files, the reference's outputs among them, and its JSON."""
        commands, binary = [], group.binary("QPC")
        for run in group.runs:
            place = prepare(group.folder, run, ".raw")
            entries: list[dict[str, Any]] = []
            sides: tuple[Direction, ...] = ("in", "out")
            for side in sides:
                for tensor, array in read(run, side):
                    file = Path(input_path(run, tensor, ".raw")).name
                    write_raw(place / file, array)
                    entries.append(_entry(file, side, tensor, array.shape))
            text = json.dumps({"IO-files": [entries]}, indent=1) + "\n"
            (place / JSON_NAME).write_text(text, encoding="utf-8")
            output = quoted(f"outputs/{group.name}/{run.label}")
            commands.append(
                f"mkdir -p {output} && qaic-runner -t {binary} -n 1 --aic-batch-json-input "
                f"{quoted(f'{group.name}/{run.label}/{JSON_NAME}')} --write-output-start-iter 0 "
                f"--write-output-num-samples 1 --write-output-dir {output}"
            )
        return commands

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield what the runner wrote for each step."""
        for run in group.runs:
            place = group.outputs / run.label
            if place.is_dir():
                files = raw_files(place, (".bin", ".raw"))
                yield run, [replace(f, name=_ACTIVATION.sub("", f.name)) for f in files]

    def find_recorded(self, path: Path) -> Iterator[Recorded]:
        """Yield the runs of an ``aic_batch_io.json``, but for those that a later one wrote over."""
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
        for number, entries in enumerate(sets):
            if any(last[entry["path"]] != number for entry in entries):
                continue
            sides: dict[str, list[Found]] = {"in": [], "out": []}
            for entry in entries:
                found = _found(entry, root)
                side = sides[entry["io-direction"]]
                if any(other.name == found.name for other in side):
                    raise DumpError(f"{file} has {found.name!r} twice in one run")
                side.append(found)
            phase, index = _step(entries)
            yield Recorded(phase, index, number, sides["in"], sides["out"])


def _entry(
    file: str, side: Direction, tensor: PackedTensor, shape: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "path": file,
        "io-direction": side,
        "elem-size": DTYPES[tensor.dtype].itemsize,
        "map-to": tensor.name,
        "dims": list(shape),
    }


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


def _found(entry: dict[str, Any], root: Path) -> Found:
    """A file, with the dtype that its name and element size tell."""
    match = _CACHE.match(entry["map-to"])
    name = entry["map-to"]
    if match is not None:
        name = f"{'present' if match[3] else 'past_key_values'}.{match[2]}.{match[1]}"
    integer = name.endswith(("_ids", "_index"))
    size = entry["elem-size"]
    dtypes = {1: "int8", 2: "float16", 4: "int32" if integer else "float32", 8: "int64"}
    path = root / entry["path"]
    if size not in dtypes:
        raise DumpError(f"{name!r} of {path} has elements of {size} bytes, which are not known")
    check_within(path, root)
    dims = entry.get("dims")
    shape = tuple(dims) if dims is not None else None
    return Found(name, str(path), raw=path, dtype=dtypes[size], certain=False, shape=shape)


def _step(entries: list[dict[str, Any]]) -> tuple[Phase | None, int | None]:
    """The step that the folder's name tells; of QEfficient's ``decode`` the first."""
    match = _STEP.match(Path(entries[0]["path"]).parent.name)
    if match is None:
        return None, None
    if match[1] == "decode":
        return "decode", int(match[2] or 0)
    return "prefill", None if match[2] is None else int(match[2])
