"""Saved inputs and outputs of NVIDIA's Polygraphy: JSON with base64 ``.npy`` arrays.

Inputs are a list of feed dictionaries, as ``--load-inputs`` reads; outputs are ``RunResults``, as
``--load-outputs`` reads and ``--save-outputs`` writes. Polygraphy knows neither bfloat16 nor 8-bit
floats, so these become float32, which holds each of their values.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.messages import counted
from qeff_proxy.dump.convert.common import (
    ConversionSource,
    StepArrays,
    new_folder,
    npy_from_bytes,
    npy_to_bytes,
    read_limited,
    write_steps,
)
from qeff_proxy.dump.format import Direction
from qeff_proxy.dump.manifest import StepInfo
from qeff_proxy.dump.rules import parse_json
from qeff_proxy.errors import DumpError

INPUTS, OUTPUTS = "inputs.json", "outputs.json"
_CLASS = "polygraphy_class"


def export_dump(
    source: ConversionSource, folder: Path, *, runner: str = "qeff-proxy"
) -> tuple[Path, Path]:
    """Write one part of a dump for Polygraphy, one iteration per step.

    Args:
        source: The part.
        folder: New or empty; ``inputs.json`` and ``outputs.json``.
        runner: The name of the runner in the outputs.

    Returns:
        The paths of the inputs and of the outputs.

    Raises:
        DumpError: The folder cannot be written, or the dump is damaged.
    """
    steps = source.steps()
    tail = f', "runtime": 0.0, "runner_name": {json.dumps(runner)}, "{_CLASS}": "IterationResult"}}'
    with new_folder(folder) as work:
        with (work / INPUTS).open("x", encoding="utf-8") as file:
            file.write("[")
            for number, step in enumerate(steps):
                file.write(",\n" if number else "\n")
                file.writelines(_encode(source, step, "in"))
            file.write("\n]\n")
        with (work / OUTPUTS).open("x", encoding="utf-8") as file:
            file.write(f'{{"lst": [[{json.dumps(runner)}, [')
            for number, step in enumerate(steps):
                file.write(',\n{"outputs": ' if number else '\n{"outputs": ')
                file.writelines(_encode(source, step, "out"))
                file.write(tail)
            file.write(f']]], "{_CLASS}": "RunResults"}}\n')
    return folder / INPUTS, folder / OUTPUTS


def _encode(source: ConversionSource, step: StepInfo, direction: Direction) -> Iterator[str]:
    """Yield the pieces of one feed dictionary, an array at a time."""
    lead = "{"
    for graph_name, array in source.arrays(step, direction):
        plain = array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
        data = base64.b64encode(npy_to_bytes(plain)).decode("ascii")
        encoded = f'{{"array": "{data}", "{_CLASS}": "ndarray"}}'
        if direction == "out":
            encoded = f'{{"values": {encoded}, "{_CLASS}": "LazyArray"}}'
        yield f"{lead}{json.dumps(graph_name)}: {encoded}"
        lead = ", "
    yield "}" if lead == ", " else "{}"


def import_dump(
    path: Path,
    folder: Path,
    *,
    like: ConversionSource | None = None,
    part: str | None = None,
    runner: str | None = None,
) -> None:
    """Make a dump of what Polygraphy saved.

    Args:
        path: JSON of ``--save-inputs`` or of ``--save-outputs``, or a folder with ``inputs.json``,
            ``outputs.json`` or both.
        folder: Of the new dump.
        like: A dump of the same run, for the steps' names; without it all are prefill.
        part: The part's name in the new dump.
        runner: Whose outputs, when there are several.

    Raises:
        DumpError: A file is not what Polygraphy writes, or the two have different lengths.
    """
    inputs, outputs = _find_files(path)
    feeds = _read_inputs(inputs) if inputs is not None else None
    name, results = _read_outputs(outputs, runner) if outputs is not None else (None, None)
    if feeds is None and results is None:
        raise DumpError(f"{path} has neither {INPUTS} nor {OUTPUTS}")
    if feeds is not None and results is not None and len(feeds) != len(results):
        raise DumpError(
            f"{inputs} has {counted(len(feeds), 'iteration')} and {outputs} {len(results)}"
        )

    def steps() -> Iterator[StepArrays]:
        for number in range(len(feeds if feeds is not None else results or [])):
            yield StepArrays(
                _decode(feeds[number], f"{inputs}") if feeds is not None else {},
                _decode(results[number], f"{outputs}") if results is not None else {},
            )

    provenance = {"converted_from": "Polygraphy", "runner": name}
    write_steps(folder, steps(), provenance, like=like, part=part)


def _find_files(path: Path) -> tuple[Path | None, Path | None]:
    """The files of inputs and outputs: both of a folder, or the one that was named."""
    if path.is_dir():
        inputs, outputs = path / INPUTS, path / OUTPUTS
        return inputs if inputs.exists() else None, outputs if outputs.exists() else None
    begins = b""
    with suppress(OSError):  # reading it as outputs reports what is wrong
        if path.is_file():  # opening a pipe would wait for its writer
            with path.open("rb") as file:
                begins = file.read(64).lstrip()[:1]
    return (path, None) if begins == b"[" else (None, path)


def _read_inputs(path: Path) -> list[Any]:
    value = parse_json(read_limited(path, path.parent), path)
    if not isinstance(value, list):
        raise DumpError(f"{path} is not a list of feed dictionaries")
    return value


def _read_outputs(path: Path, runner: str | None) -> tuple[str, list[Any]]:
    value = parse_json(read_limited(path, path.parent), path)
    runs = value.get("lst") if isinstance(value, dict) else None
    if not isinstance(runs, list) or not all(
        isinstance(run, list)
        and len(run) == 2
        and isinstance(run[0], str)
        and isinstance(run[1], list)
        for run in runs
    ):
        raise DumpError(f"{path} is not Polygraphy's RunResults")
    chosen = [run for run in runs if runner in (None, run[0])]
    if len(chosen) != 1:
        names = ", ".join(run[0] for run in runs)
        raise DumpError(f"{path} has the runners {names or 'of nobody'}", "Name one of them.")
    name, results = chosen[0]
    if not all(isinstance(result, dict) for result in results):
        raise DumpError(f"{path} is not Polygraphy's RunResults")
    return name, [result.get("outputs") for result in results]


def _decode(feed: Any, where: str) -> dict[str, NDArray[Any]]:
    if not isinstance(feed, dict):
        raise DumpError(f"{where} has an iteration that is not a dictionary")
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in feed.items():
        while isinstance(value, dict) and "values" in value:  # a LazyArray, however nested
            value = value["values"]
        data = value.get("array") if isinstance(value, dict) else None
        if not isinstance(data, str):
            raise DumpError(f"{name!r} of {where} is not an array")
        try:
            decoded = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DumpError(f"{name!r} of {where} is not base64: {error}") from error
        arrays[name] = npy_from_bytes(decoded, f"{name!r} of {where}")
    return arrays
