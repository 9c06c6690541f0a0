"""A capsule: a ZIP file of the smallest graph that still shows a fault, with inputs and outputs.

It holds ``model.onnx`` (weights inside, fixed shapes), ``inputs.npz``, ``expected.npz`` (computed
by ONNX Runtime, an operator at a time), ``actual.npz`` (the backend's), ``capsule.json`` and
``run.py``, which runs the graph with numpy and onnxruntime alone. Nothing in it is pickled, and
nothing of it is executed when it is read.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.common.file_errors import check_writable, writing
from qeff_proxy.common.version import installed_version
from qeff_proxy.common.write_whole import write_whole
from qeff_proxy.compare.report_file import check_outside
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.isolate.blame import distance
from qeff_proxy.isolate.operators import Group, Values
from qeff_proxy.verify.results import reason_of

FORMAT = 1
_ARRAYS = ("inputs", "expected", "actual")
_FILES = ("model.onnx", *(f"{name}.npz" for name in _ARRAYS), "capsule.json", "run.py")
#: A graph with its weights is one Protocol Buffers message, which may have 2 GiB.
_LARGEST = 2_000_000_000
_LONGEST = 1_000_000  # letters of capsule.json

_SCRIPT = '''\
"""Run the graph of this folder, and compare with what is expected. Needs numpy and onnxruntime.

    python run.py
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder = Path(__file__).resolve().parent
facts = json.loads((folder / "capsule.json").read_text())
inputs, expected, actual = (
    dict(np.load(folder / f"{name}.npz", allow_pickle=False))
    for name in ("inputs", "expected", "actual")
)
session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
)
names = [output.name for output in session.get_outputs()]
here = dict(zip(names, session.run(names, inputs)))


def error(outputs):
    peaks = {name: np.abs(expected[name]).max() or 1 for name in names}
    return max(
        float(np.nan_to_num(np.abs(outputs[n] - expected[n]).max(), nan=inf, posinf=inf) / peaks[n])
        for n in names
    )


def share(value):
    return f"{value:.3%}" if np.isfinite(value) else "not finite"


inf = np.inf
gave, gives = error(actual), error(here)
shows = gives >= gave / 2 > 0
print("operators:", ", ".join(facts["operators"]))
print(f"error over the peak of what is expected, {facts['backend']}: {share(gave)}")
print(f"error over the peak of what is expected, onnxruntime here: {share(gives)}")
print("The fault shows here." if shows else "The fault does not show here.")
sys.exit(1 if shows else 0)
'''


@dataclass(frozen=True)
class Capsule:
    """A capsule, read.

    Attributes:
        model: The graph.
        inputs: Its inputs.
        expected: Its exact outputs.
        actual: Those of the backend that was at fault.
        facts: Operators, backend, versions, and where the graph is from.
    """

    model: onnx.ModelProto
    inputs: Values
    expected: Values
    actual: Values
    facts: Mapping[str, Any]

    @property
    def error(self) -> float:
        """The backend's largest error over the peak."""
        return distance(self.expected, self.actual)


def check_capsule_place(path: Path) -> None:
    """Refuse a place where a capsule cannot be written, before anything is run.

    Raises:
        UsageError: It is a folder.
        ArtifactError: Its folder cannot be written to.
        DumpError: It lies in a dump or an export.
    """
    check_outside(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "Name a file for the capsule.")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", "Make it, or name another place.")
    check_writable(path.parent)


def pack(
    path: Path,
    group: Group,
    inputs: Values,
    expected: Values,
    actual: Values,
    facts: Mapping[str, Any],
) -> None:
    """Write a capsule.

    Args:
        path: The ZIP file; one that exists is replaced.
        group: The graph; its weights are written, too.
        inputs: Its inputs.
        expected: Its exact outputs.
        actual: Those of the backend that is at fault.
        facts: What to note of where it is from; JSON values.

    Raises:
        ArtifactError: The file cannot be written, or would be too large.
    """
    model = with_weights(group)
    noted = {
        "format": FORMAT,
        **facts,
        "operators": list(group.operators),
        "tensors": {**group.inputs, **group.outputs},
        "versions": {
            **facts.get("versions", {}),
            "qeff-proxy": installed_version(),
            **{name: version(name) for name in ("numpy", "onnx", "onnxruntime")},
        },
    }
    _write(path, ir.serde.serialize_model(model), inputs, expected, actual, noted)


def with_weights(group: Group) -> ir.Model:
    """The group's graph with its weights inside.

    Raises:
        ArtifactError: They are too large for one file.
    """
    model = group.graph.model
    size = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            size += value.const_value.nbytes
            if size > _LARGEST:
                raise ArtifactError(
                    f"the capsule would have more than {_LARGEST:,} bytes of weights",
                    "An operator's weights must fit into one ONNX file.",
                )
            array = np.array(value.const_value.numpy())
            value.const_value = ir.tensor(array, name=name)
    return model


def _write(
    path: Path,
    model: onnx.ModelProto,
    inputs: Values,
    expected: Values,
    actual: Values,
    facts: Mapping[str, Any],
) -> None:
    def packed(arrays: Values) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    contents = {
        "model.onnx": model.SerializeToString(),
        "inputs.npz": packed(inputs),
        "expected.npz": packed(expected),
        "actual.npz": packed(actual),
        "capsule.json": json.dumps(facts, indent=2).encode(),
        "run.py": _SCRIPT.encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with writing(path.parent):
        write_whole(path, buffer.getvalue())


def read_capsule(path: Path) -> Capsule:
    """Read a capsule.

    Raises:
        ArtifactError: The file is none, is damaged, or is of another version.
    """

    def damaged(why: str) -> NoReturn:
        raise ArtifactError(f"{path} is no capsule that can be read: {why}", "Make it again.")

    try:
        with zipfile.ZipFile(path) as archive:
            contents = _members(archive, damaged)
            if sorted(contents) != sorted(_FILES):
                damaged("it does not hold the files of one")
        facts = json.loads(contents["capsule.json"], parse_constant=damaged)
        arrays = {name: _arrays(contents[f"{name}.npz"], damaged) for name in _ARRAYS}
        model = onnx.load_from_string(contents["model.onnx"])
    except ArtifactError:
        raise
    except OSError as error:
        damaged(error.strerror or str(error))
    except Exception as error:  # noqa: BLE001 (what readers of ZIP, JSON, NumPy and ONNX raise)
        damaged(reason_of(error))
    if not isinstance(facts, dict) or facts.get("format") is not FORMAT:
        damaged("it is of another version of this program")
    operators = facts.get("operators")
    if not isinstance(operators, list) or not operators or len(str(facts)) > _LONGEST:
        damaged("capsule.json is not what it writes")
    if _points_outside(model):
        damaged("its graph points to another file")
    outputs = {value.name for value in model.graph.output}
    if {value.name for value in model.graph.input} != set(arrays["inputs"]):
        damaged("its inputs are not those of its graph")
    if not outputs or outputs != set(arrays["expected"]) or outputs != set(arrays["actual"]):
        damaged("its outputs are not those of its graph")
    for name, array in arrays["expected"].items():
        other = arrays["actual"][name]
        if (array.shape, array.dtype) != (other.shape, other.dtype):
            damaged(f"{name} is not alike in expected and actual")
        if array.dtype.kind == "f" and np.isnan(array).any():
            damaged(f"{name} is expected to be NaN")
    if not distance(arrays["expected"], arrays["actual"]):
        damaged("it records no error")
    return Capsule(model, arrays["inputs"], arrays["expected"], arrays["actual"], facts)


def _points_outside(message: Any) -> bool:
    """Whether a tensor anywhere in a graph (weights, attributes, subgraphs) is in another file."""
    if isinstance(message, onnx.TensorProto):
        return bool(message.external_data) or message.data_location == message.EXTERNAL
    fields = message.ListFields() if hasattr(message, "ListFields") else ()
    inner = [one if isinstance(one, Iterable) else [one] for _, one in fields]
    return any(_points_outside(one) for several in inner for one in several)


def _members(archive: zipfile.ZipFile, damaged: Callable[[str], NoReturn]) -> dict[str, bytes]:
    """The files of an archive that stores them as they are, so that none is larger than it."""
    members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in members):
        damaged("its files are compressed")
    if len({one.filename for one in members}) < len(members):
        damaged("a file is in it twice")
    return {one.filename: archive.read(one) for one in members}


def _arrays(data: bytes, damaged: Callable[[str], NoReturn]) -> dict[str, Array]:
    """The arrays of a ``.npz`` file: numbers of kinds that graphs have."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = _members(archive, damaged)
    arrays = {}
    for name, content in members.items():
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        if array.dtype.kind not in "biuf" or not array.dtype.isnative:
            damaged(f"{name} holds {array.dtype}")
        arrays[name.removesuffix(".npy")] = array
    return arrays
