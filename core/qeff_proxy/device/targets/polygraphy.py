"""Saved inputs and outputs of NVIDIA's Polygraphy: JSON with base64 ``.npy`` arrays.

``<group>/inputs.json`` is a list of feed dictionaries, as ``--load-inputs`` reads, one a run;
``<group>/outputs.json`` holds the reference's outputs, as ``--load-outputs`` reads. What
``--save-outputs`` writes is expected at ``outputs/<group>/outputs.json``. Polygraphy knows neither
bfloat16 nor 8-bit floats, so these become float32, which holds each of their values. A file of
outputs is read whole.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.messages import counted
from qeff_proxy.device.foreign import npy_from_bytes, npy_to_bytes, read_limited
from qeff_proxy.device.index import PackedRun
from qeff_proxy.device.target import Found, Group, Reader, Recorded, Target, quoted
from qeff_proxy.dump.format import AS_BITS, Direction
from qeff_proxy.dump.rules import parse_json
from qeff_proxy.errors import DumpError

INPUTS, OUTPUTS = "inputs.json", "outputs.json"
_CLASS = "polygraphy_class"
_RUNNER = "qeff-proxy"


class PolygraphyTarget(Target):
    """Polygraphy's JSON."""

    name = "polygraphy"
    uses = ("runner",)

    def file_dtype(self, dtype: str) -> str:
        """float32 for what NumPy does not know."""
        return "float32" if dtype in AS_BITS else dtype

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write inputs and expected outputs, one iteration a run."""
        runner = json.dumps(_RUNNER)
        tail = f', "runtime": 0.0, "runner_name": {runner}, "{_CLASS}": "IterationResult"}}'
        group.place.mkdir()
        with (group.place / INPUTS).open("x", encoding="utf-8") as file:
            file.write("[")
            for number, run in enumerate(group.runs):
                file.write(",\n" if number else "\n")
                file.writelines(_encode(read, run, "in"))
            file.write("\n]\n")
        with (group.place / OUTPUTS).open("x", encoding="utf-8") as file:
            file.write(f'{{"lst": [[{runner}, [')
            for number, run in enumerate(group.runs):
                file.write(',\n{"outputs": ' if number else '\n{"outputs": ')
                file.writelines(_encode(read, run, "out"))
                file.write(tail)
            file.write(f']]], "{_CLASS}": "RunResults"}}\n')
        place = quoted(group.name)
        return [
            f'polygraphy run "$MODEL" --trt --load-inputs {place}/{INPUTS} '
            f"--save-outputs outputs/{place}/{OUTPUTS}"
        ]

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the outputs of each iteration."""
        path = group.outputs / OUTPUTS
        if not path.exists():
            return
        results = _read_outputs(path, self.runner)
        if len(results) != len(group.runs):
            raise DumpError(
                f"{path} has {counted(len(results), 'iteration')} and the packed {INPUTS} "
                f"{len(group.runs)}, so it cannot be told which step each is",
                "Run all of them again.",
            )
        for number, run in enumerate(group.runs):
            yield run, _found(results[number], f"iteration {number} of {path}")

    def find_recorded(self, path: Path) -> Iterator[Recorded]:
        """Yield each iteration of ``--save-inputs`` and ``--save-outputs``."""
        inputs, outputs = _find_files(path)
        feeds = _read_inputs(inputs) if inputs is not None else None
        results = _read_outputs(outputs, self.runner) if outputs is not None else None
        if feeds is None and results is None:
            raise DumpError(f"{path} has neither {INPUTS} nor {OUTPUTS}")
        if feeds is not None and results is not None and len(feeds) != len(results):
            raise DumpError(
                f"{inputs} has {counted(len(feeds), 'iteration')} and {outputs} {len(results)}"
            )
        for number in range(len(feeds if feeds is not None else results or [])):
            yield Recorded(
                None,
                None,
                number,
                _found(feeds[number], f"{inputs}") if feeds is not None else [],
                _found(results[number], f"{outputs}") if results is not None else [],
            )


def _encode(read: Reader, run: PackedRun, side: Direction) -> Iterator[str]:
    """Yield the pieces of one feed dictionary, an array at a time."""
    lead = "{"
    for tensor, array in read(run, side):
        plain = array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
        data = base64.b64encode(npy_to_bytes(np.ascontiguousarray(plain))).decode("ascii")
        encoded = f'{{"array": "{data}", "{_CLASS}": "ndarray"}}'
        if side == "out":
            encoded = f'{{"values": {encoded}, "{_CLASS}": "LazyArray"}}'
        yield f"{lead}{json.dumps(tensor.name)}: {encoded}"
        lead = ", "
    yield "}" if lead == ", " else "{}"


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


def _read_outputs(path: Path, runner: str | None) -> list[Any]:
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
        raise DumpError(
            f"{path} has the runners {names or 'of nobody'}", "Name one of them: --runner NAME."
        )
    results = chosen[0][1]
    if not all(isinstance(result, dict) for result in results):
        raise DumpError(f"{path} is not Polygraphy's RunResults")
    return [result.get("outputs") for result in results]


def _found(feed: Any, where: str) -> list[Found]:
    if not isinstance(feed, dict):
        raise DumpError(f"{where} has an iteration that is not a dictionary")
    return [
        Found(name, f"{name!r} of {where}", load=_loader(value, f"{name!r} of {where}"))
        for name, value in feed.items()
    ]


def _loader(value: Any, where: str) -> Callable[[], NDArray[Any]]:
    def load() -> NDArray[Any]:
        inner = value
        while isinstance(inner, dict) and "values" in inner:  # a LazyArray, however nested
            inner = inner["values"]
        data = inner.get("array") if isinstance(inner, dict) else None
        if not isinstance(data, str):
            raise DumpError(f"{where} is not an array")
        try:
            decoded = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DumpError(f"{where} is not base64: {error}") from error
        return npy_from_bytes(decoded, where)

    return load
