"""``test_data_set_N/{input,output}_K.pb``: the layout of ONNX's backend tests.

``onnx_test_runner`` and ``onnx.backend.test`` run such folders when the model stands beside them as
``model.onnx``; N counts the runs of a group, K the graph's inputs and outputs in the graph's order.
The reference's outputs are packed too, since these runners compare. A device's outputs are expected
at the same places below ``outputs/``, each tensor with its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.device.foreign import read_limited
from qeff_proxy.device.index import PackedRun
from qeff_proxy.device.target import Found, Group, Reader, Recorded, Target
from qeff_proxy.dump.format import Direction
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


class OnnxTarget(Target):
    """ONNX test data."""

    name = "onnx"
    uses = ("model",)

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write one set per run, inputs and expected outputs."""
        from onnx import numpy_helper

        order = _graph_order(self.model) if self.model is not None else None
        sides: tuple[tuple[Direction, str], ...] = (("in", "input"), ("out", "output"))
        for number, run in enumerate(group.runs):
            place = group.place / f"test_data_set_{number}"
            place.mkdir(parents=True)
            for side, stem in sides:
                have = [tensor.name for tensor in (run.inputs if side == "in" else run.outputs)]
                names = order[side] if order is not None else have
                missing = [name for name in names if name not in have]
                if missing:
                    raise DumpError(f"{run.label} of the dump lacks {missing[0]!r} of {self.model}")
                for tensor, array in read(run, side):
                    if tensor.name in names:
                        data = numpy_helper.from_array(np.ascontiguousarray(array), tensor.name)
                        path = place / f"{stem}_{names.index(tensor.name)}.pb"
                        path.write_bytes(data.SerializeToString())
        return [f"# put the model at {group.name}/model.onnx", f"onnx_test_runner {group.name}"]

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the outputs of each set."""
        for number, run in enumerate(group.runs):
            place = group.outputs / f"test_data_set_{number}"
            if place.is_dir():
                yield run, self._find(place, group.outputs)["output"]

    def find_recorded(self, path: Path) -> Iterator[Recorded]:
        """Yield each ``test_data_set_N``."""
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
        for number, place in sets:
            found = self._find(place, path)
            yield Recorded(None, None, number, found["input"], found["output"])

    def _find(self, place: Path, root: Path) -> dict[str, list[Found]]:
        files = sorted(
            (match[1], int(match[2]), entry)
            for entry in place.iterdir()
            if (match := _FILE.match(entry.name))
        )
        _check_numbers(place, files)
        order = _graph_order(self.model) if self.model is not None else {"in": [], "out": []}
        found: dict[str, list[Found]] = {"input": [], "output": []}
        for stem, k, file in files:
            names = order["in" if stem == "input" else "out"]
            name, shape = _head(file, root, names[k] if k < len(names) else "")
            if any(other.name == name for other in found[stem]):
                raise DumpError(f"{place} has two {stem}s named {name!r}")
            found[stem].append(Found(name, str(file), shape=shape, load=_loader(file, root)))
        return found


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


def _parse(file: Path, root: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(read_limited(file, root))
    except DecodeError as error:
        raise DumpError(f"{file} is not an ONNX tensor: {error}") from error
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise DumpError(f"{file} points to data in another file")
    return tensor


def _head(file: Path, root: Path, name: str) -> tuple[str, tuple[int, ...]]:
    tensor = _parse(file, root)
    if not isinstance(tensor.name, str):  # protobuf gives bytes that are no UTF-8 as they are
        raise DumpError(f"{file} is not an ONNX tensor: its name is not UTF-8")
    if not (tensor.name or name):
        raise DumpError(f"{file} has no name", "Give the model, whose order names it.")
    return tensor.name or name, tuple(tensor.dims)


def _loader(file: Path, root: Path) -> Callable[[], NDArray[Any]]:
    def load() -> NDArray[Any]:
        from onnx import numpy_helper

        try:
            return np.asarray(numpy_helper.to_array(_parse(file, root)))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise DumpError(f"{file} is not an ONNX tensor: {error}") from error

    return load
