"""``test_data_set_N/{input,output}_K.pb``: the layout of ONNX's backend tests.

``onnx_test_runner`` and ``onnx.backend.test`` run such folders when the model stands beside them as
``model.onnx``; K counts the graph's inputs and outputs in the graph's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.dump.convert.common import (
    ConversionSource,
    StepArrays,
    new_folder,
    read_limited,
    write_steps,
)
from qeff_proxy.dump.format import Direction, Phase
from qeff_proxy.errors import DumpError

_SET = re.compile(r"test_data_set_(\d{1,9})\Z")
_FILE = re.compile(r"(input|output)_(\d{1,9})\.pb\Z")


def _graph_order(model: Path) -> dict[Direction, list[str]]:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(model, load_external_data=False).graph
    except (OSError, DecodeError, ValueError) as error:
        raise DumpError(f"{model} cannot be read as an ONNX model: {error}") from error
    constant = {tensor.name for tensor in graph.initializer}
    return {
        "in": [value.name for value in graph.input if value.name not in constant],
        "out": [value.name for value in graph.output],
    }


def export_dump(source: ConversionSource, folder: Path, *, model: Path | None = None) -> int:
    """Write one part of a dump as ONNX test data, one set per step.

    Args:
        source: The part.
        folder: New or empty.
        model: The part's ``.onnx``, whose order of inputs and outputs counts. Without it the order
            is that of the dump.

    Returns:
        The number of sets.

    Raises:
        DumpError: The folder cannot be written, the dump is damaged, or lacks a tensor of the
            model's.
    """
    from onnx import numpy_helper

    order = _graph_order(model) if model is not None else None
    steps = source.steps()
    sides: tuple[tuple[Direction, str], ...] = (("in", "input"), ("out", "output"))
    with new_folder(folder) as work:
        for number, step in enumerate(steps):
            place = work / f"test_data_set_{number}"
            place.mkdir()
            for direction, stem in sides:
                have = source.graph_names(step.phase, direction)
                names = order[direction] if order is not None else have
                missing = [name for name in names if name not in have]
                if missing:
                    raise DumpError(f"{source.dump.folder} lacks {missing[0]!r} of {model}")
                for k, name in enumerate(names):
                    array = np.ascontiguousarray(source.array(step, direction, name))
                    tensor = numpy_helper.from_array(array, name)
                    (place / f"{stem}_{k}.pb").write_bytes(tensor.SerializeToString())
    return len(steps)


def import_dump(
    path: Path,
    folder: Path,
    *,
    like: ConversionSource | None = None,
    part: str | None = None,
    model: Path | None = None,
) -> None:
    """Make a dump of ONNX test data.

    Args:
        path: A folder that holds ``test_data_set_N`` folders.
        folder: Of the new dump.
        like: A dump of the same run, for the steps' names; without it all are prefill.
        part: The part's name in the new dump.
        model: Names the tensors that have no name in their file.

    Raises:
        DumpError: A file is not a tensor, or has no name.
    """
    try:
        sets = sorted(
            (int(match[1]), entry)
            for entry in path.iterdir()
            if (match := _SET.match(entry.name)) and entry.is_dir()
        )
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error
    if not sets:
        raise DumpError(f"{path} holds no test_data_set_N folders")
    order = _graph_order(model) if model is not None else {"in": [], "out": []}

    def steps() -> Iterator[StepArrays]:
        for _, place in sets:
            sides: dict[str, dict[str, NDArray[Any]]] = {"input": {}, "output": {}}
            files = sorted(
                (match[1], int(match[2]), entry)
                for entry in place.iterdir()
                if (match := _FILE.match(entry.name))
            )
            _check_numbers(place, files)
            for stem, k, file in files:
                names = order["in" if stem == "input" else "out"]
                name, array = _read_tensor(file, path, names[k] if k < len(names) else "")
                if name in sides[stem]:
                    raise DumpError(f"{place} has two {stem}s named {name!r}")
                sides[stem][name] = array
            yield StepArrays(sides["input"], sides["output"])

    labels: list[tuple[Phase, int]] = [("prefill", number) for number, _ in sets]
    write_steps(
        folder, steps(), {"converted_from": "ONNX test data"}, like=like, part=part, labels=labels
    )


def _check_numbers(place: Path, files: list[tuple[str, int, Path]]) -> None:
    """Refuse a set that lacks a file: the numbers are the graph's order, so none is left out."""
    for stem in ("input", "output"):
        numbers = {k for kind, k, _ in files if kind == stem}
        missing = next((k for k in range(max(numbers, default=-1)) if k not in numbers), None)
        if missing is not None:
            raise DumpError(
                f"{place} lacks {stem}_{missing}.pb and has {stem}_{max(numbers)}.pb",
                "Add the file, or remove the folder.",
            )


def _read_tensor(file: Path, root: Path, name: str) -> tuple[str, NDArray[Any]]:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(read_limited(file, root))
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise DumpError(f"{file} points to data in another file")
        array = np.asarray(numpy_helper.to_array(tensor))
    except (DecodeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise DumpError(f"{file} is not an ONNX tensor: {error}") from error
    if not (tensor.name or name):
        raise DumpError(f"{file} has no name", "Give the model, whose order names it.")
    return tensor.name or name, array
