"""A capsule: a ZIP file of the smallest graph that still shows a fault, with inputs and outputs.

It holds ``model.onnx`` (weights inside, fixed shapes), ``inputs.npz``, ``expected.npz`` (computed
by ONNX Runtime, an operator at a time), ``actual.npz`` (the backend's), ``capsule.json`` and
``run.py``, which runs the graph with numpy and onnxruntime alone. Nothing in it is pickled, and
nothing of it is executed when it is read.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnx_ir as ir

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.file_errors import writing
from qeff_proxy.common.version import installed_version
from qeff_proxy.compare.report_file import write_whole
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.isolate.blame import Trials, over_peak
from qeff_proxy.isolate.operators import Group, Operators, PlainRuntime, Values
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import size_of, terms_of
from qeff_proxy.verify.results import reason_of

FORMAT = 1
_SAME = 0.5
#: With other weights, what remains of an error that is still seen.
_STILL = 0.1
_ARRAYS = ("inputs", "expected", "actual")
_FILES = ("model.onnx", *(f"{name}.npz" for name in _ARRAYS), "capsule.json", "run.py")
#: A graph with its weights is one Protocol Buffers message, which may have 2 GiB.
_LARGEST = 2_000_000_000

_SCRIPT = '''\
"""Run the graph of this folder, and compare with what is expected. Needs numpy and onnxruntime.

    python run.py
"""
import json
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
        float(np.nan_to_num(np.abs(outputs[n] - expected[n]).max(), nan=np.inf) / peaks[n])
        for n in names
    )


print(f"{', '.join(facts['operators'])}: the largest error over the peak of what is expected")
print(f"  {facts['backend']} gave    {error(actual):.3g}")
print(f"  onnxruntime gives here  {error(here):.3g}")
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


@dataclass(frozen=True)
class Rerun:
    """A capsule on a backend.

    Attributes:
        capsule: Its file.
        backend: The backend that ran it.
        recorded: The error in the capsule, over the peak, of the backend named there.
        error: The error of this one.
        facts: What the capsule says of itself.
    """

    capsule: Path
    backend: str
    recorded: float
    error: float
    facts: Mapping[str, Any]

    @property
    def shows(self) -> bool:
        """Whether the fault shows: at least half of its error."""
        return self.error == math.inf or self.error >= _SAME * self.recorded > 0

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; numbers that are infinite are None."""
        numbers = {"recorded": self.recorded, "error": self.error}
        finite = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
        plain = {"capsule": str(self.capsule), "backend": self.backend, "shows": self.shows}
        return {**plain, **finite, "facts": dict(self.facts)}


def distance(expected: Values, actual: Values) -> float:
    """The largest error of an output over its peak."""
    return max((over_peak(array, actual[name]) for name, array in expected.items()), default=0.0)


def write_capsule(
    path: Path,
    trials: Trials,
    numbers: tuple[int, ...],
    facts: Mapping[str, Any],
    *,
    anonymous: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> str:
    """Write the operators that cause a fault to a file that runs elsewhere.

    Args:
        path: The ZIP file; one that exists is replaced.
        trials: The layer, and how its backend opens groups.
        numbers: The operators.
        facts: What to note of where it is from; JSON values.
        anonymous: Exchange the weights for random numbers of their mean and deviation.
        progress: Called with the name of each stage as it starts.

    Returns:
        What was reduced, in words.

    Raises:
        UsageError: The fault does not survive random weights.
        ArtifactError: The file cannot be written, or would be too large.
    """
    progress("reducing the capsule's inputs")
    smaller, said = _reduced(trials, numbers)
    operators = smaller.operators
    group = operators.group(numbers)
    model = _with_weights(group)
    inputs = {new: np.asarray(operators.values[old]) for new, old in group.inputs.items()}
    if anonymous:
        _exchange_weights(model)
    expected = _run_plainly(model, inputs)
    with smaller.opened(replace(group, graph=replace(group.graph, model=model))) as session:
        actual = session.run(inputs)
    if anonymous and distance(expected, actual) < _STILL * _error_of_outputs(smaller, group):
        raise UsageError(
            "the fault does not show with random weights",
            "Without --anonymous the capsule holds the model's own.",
        )
    noted = {"weights": "random" if anonymous else "the model's", **facts}
    pack(path, group, inputs, expected, actual, noted)
    return said


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
    model = _with_weights(group)
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


def _error_of_outputs(trials: Trials, group: Group) -> float:
    """The group's error with the model's own weights."""
    values = trials.operators.values
    with trials.opened(group) as session:
        found = session.run({new: np.asarray(values[old]) for new, old in group.inputs.items()})
    return distance({new: values[old] for new, old in group.outputs.items()}, found)


def _reduced(trials: Trials, numbers: tuple[int, ...]) -> tuple[Trials, str]:
    """The same fault with fewer rows and shorter sequences."""
    layer = trials.operators.layer
    feeds = {spec.name: trials.operators.values[spec.name] for spec in layer.inputs}
    error = trials.error(numbers) or 0.0
    sizes = _sizes_of(layer.inputs, feeds)
    said = []
    for axis, size in list(sizes.items()):
        for fewer in dict.fromkeys(n for n in (1, size // 4, size // 2) if 0 < n < size):
            tried = {**sizes, axis: fewer}
            cut = {spec.name: _cut(feeds[spec.name], spec, sizes, tried) for spec in layer.inputs}
            with suppress(Exception):  # a graph that is not for these sizes
                attempt = trials.on(Operators(layer, cut))
                if (attempt.error(numbers) or 0.0) >= _SAME * error:
                    trials, feeds, sizes = attempt, cut, tried
                    said.append(f"{axis} {size} → {fewer}")
                    break
    return trials, ", ".join(said)


def _sizes_of(specs: tuple[TensorSpec, ...], feeds: Values) -> dict[str, int]:
    """The size of each axis that has a name of its own."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(axis, str) and axis.isidentifier()
    }


def _cut(array: Array, spec: TensorSpec, sizes: Mapping[str, int], new: Mapping[str, int]) -> Array:
    """The first elements of each axis; of a sum (``past + query``), those of each of its terms."""
    for number, axis in enumerate(spec.shape):
        places: list[int] = []
        start = 0
        for term in terms_of(axis):
            places += range(start, start + size_of(_axis(term), new))
            start += size_of(_axis(term), sizes)
        if len(places) != array.shape[number]:
            array = array.take(places, axis=number)
    return array


def _axis(term: str) -> int | str:
    return int(term) if term.isdigit() else term


def _with_weights(group: Group) -> ir.Model:
    """The group's graph with its weights inside."""
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


def _exchange_weights(model: ir.Model) -> None:
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is None or array.dtype.kind != "f" or array.size < 2:
            continue
        random = generator.normal(array.mean(), array.std() or 1.0, array.shape)
        value.const_value = ir.tensor(random.astype(array.dtype), name=name)


def _run_plainly(model: ir.Model, inputs: Values) -> dict[str, Array]:
    plain = PlainRuntime(model)
    values = dict(inputs)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            values[name] = value.const_value.numpy()
    for node in model.graph:
        outputs = [value for value in node.outputs if value.name]
        values |= {
            str(value.name): array
            for value, array in zip(outputs, plain.run(node, values), strict=True)
        }
    return {str(value.name): values[str(value.name)] for value in model.graph.outputs}


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
            names = archive.namelist()
            if sorted(names) != sorted(_FILES):
                damaged("it does not hold the files of one")
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size * 2:
                damaged("its files are larger than it says")  # they are stored, not compressed
            contents = {name: archive.read(name) for name in names}
        facts = json.loads(contents["capsule.json"])
        arrays = {
            name: dict(np.load(io.BytesIO(contents[f"{name}.npz"]), allow_pickle=False))
            for name in _ARRAYS
        }
        model = onnx.load_from_string(contents["model.onnx"])
    except ArtifactError:
        raise
    except OSError as error:
        damaged(error.strerror or str(error))
    except Exception as error:  # noqa: BLE001 (what readers of ZIP, JSON, NumPy and ONNX raise)
        damaged(reason_of(error))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        damaged("it is of another version of this program")
    if any(tensor.external_data for tensor in model.graph.initializer):
        damaged("its graph points to another file")
    outputs = {value.name for value in model.graph.output}
    if {value.name for value in model.graph.input} != set(arrays["inputs"]):
        damaged("its inputs are not those of its graph")
    if not outputs or outputs != set(arrays["expected"]) or outputs != set(arrays["actual"]):
        damaged("its outputs are not those of its graph")
    return Capsule(model, arrays["inputs"], arrays["expected"], arrays["actual"], facts)


def run_capsule(path: Path, backend: str, options: CompileOptions | None = None) -> Rerun:
    """Run a capsule on a backend, and compare with what is expected.

    Raises:
        ArtifactError: The capsule cannot be read.
        BackendError: The backend cannot be used, or refuses the graph.
    """
    capsule = read_capsule(path)
    options = options or CompileOptions()
    runner = load_backend(backend)
    runner.check_options(backend, options)
    with tempfile.TemporaryDirectory(prefix="qeff-proxy-capsule-") as name:
        folder = Path(name)
        part = _part(capsule, folder)
        export = Export(
            folder, "whole", "capsule", "float32", {"source": str(path)}, (part,), {}, {}, {}, {}
        )
        (folder / "compiled").mkdir()
        with runner.open_once(export, part, options, folder / "compiled") as session:
            actual = session.run(capsule.inputs)
    error = distance(capsule.expected, actual)
    return Rerun(path, backend, capsule.error, error, capsule.facts)


def _part(capsule: Capsule, folder: Path) -> ExportedPart:
    """Write the graph as an export's part."""
    file = folder / "capsule.onnx"
    onnx.save(capsule.model, file)

    def specs(arrays: Values) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, a.dtype.name, a.shape) for n, a in arrays.items())

    sha256 = sha256_of(file)
    inputs, outputs = specs(capsule.inputs), specs(capsule.expected)
    return ExportedPart("capsule", file.name, None, sha256, inputs, outputs)
