"""A device that stands in for one in a lab: it reads a packed folder as each tool would, computes
the outputs, and writes them in the tool's own layout, with a fault if asked.

As a command, ``python device_stand_in.py FOLDER EXPORT [FAULT]`` runs the export's parts in ONNX
Runtime.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

BITS = {"bfloat16": (np.uint16, ml_dtypes.bfloat16)}


def dtype_of(name):
    return BITS[name][1] if name in BITS else np.dtype(name)


def stem(name):
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def plain(array):
    """Bits of what NumPy does not know."""
    for bits, dtype in BITS.values():
        if array.dtype == dtype:
            return array.view(bits)
    return array


def file_shape(tensor):
    order = tensor["axes"] or range(len(tensor["shape"]))
    return [tensor["shape"][axis] for axis in order]


def raw(path, tensor):
    return np.fromfile(path, dtype_of(tensor["dtype"])).reshape(file_shape(tensor))


def read_inputs(folder, target, group, runs):
    """Yield the inputs of each run, by the graph's name, read as the tool reads them."""
    place = folder / group
    if target in ("qnn-net-run", "snpe-net-run"):
        for line, run in zip(
            (place / "input_list.txt").read_text().splitlines(), runs, strict=True
        ):
            words = dict(word.split(":=") for word in line.split())
            names = {re.sub(r"[^A-Za-z0-9_]", "_", t["name"]): t for t in run["inputs"]}
            names |= {t["name"]: t for t in run["inputs"]}
            yield {names[n]["name"]: raw(folder / path, names[n]) for n, path in words.items()}
    elif target == "ai-hub":
        import h5py

        with h5py.File(place / "inputs.h5", "r") as file:
            for number in range(len(runs)):
                yield {
                    entry.attrs["name"]: np.array(entry[f"batch_{number}"])
                    for entry in file["data"].values()
                }
    elif target == "polygraphy":
        from polygraphy.json import load_json

        yield from (dict(feed) for feed in load_json(str(place / "inputs.json")))
    elif target == "onnx":
        import onnx
        from onnx import numpy_helper

        for number in range(len(runs)):
            files = sorted((place / f"test_data_set_{number}").glob("input_*.pb"))
            tensors = [onnx.load_tensor(file) for file in files]
            yield {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    else:
        for run in runs:
            step = place / label(run)
            yield {t["name"]: read_one(target, step, t) for t in run["inputs"]}


def read_one(target, step, tensor):
    name = stem(tensor["name"])
    if target == "npy":
        return np.load(step / f"{name}.npy").view(dtype_of(tensor["dtype"]))
    if target == "npz":
        with np.load(step.with_name(step.name + ".npz")) as archive:
            return archive[name].view(dtype_of(tensor["dtype"]))
    if target == "qaic-runner":
        entries = json.loads((step / "aic_batch_io.json").read_text())["IO-files"][0]
        (entry,) = (e for e in entries if e["map-to"] == tensor["name"])
        assert entry["io-direction"] == "in"
        assert entry["dims"] == file_shape(tensor)
        return raw(step / entry["path"], tensor)
    return raw(step / f"{name}.raw", tensor)  # trtexec


def label(run):
    return f"{run['phase']}-{run['index']:04d}"


def write_outputs(folder, target, group, runs, answers):
    """Write the outputs of each run as the tool does."""
    place = folder / "outputs" / group
    place.mkdir(parents=True, exist_ok=True)
    native = any(t["dtype"] != "float32" for run in runs for t in run["inputs"] + run["outputs"])
    if target == "ai-hub":
        import h5py

        with h5py.File(place / "outputs.h5", "w") as file:
            for order, name in enumerate(answers[0]):
                for number, answer in enumerate(answers):
                    file.create_dataset(
                        name=f"data/{order}/batch_{number}", data=answer[name], compression="gzip"
                    )
                file[f"data/{order}"].attrs["order"] = order
                file[f"data/{order}"].attrs["name"] = name
                file[f"data/{order}"].attrs["batch_count"] = len(answers)
        return
    if target == "polygraphy":
        from polygraphy.comparator import RunResults

        results = RunResults()
        results.add([dict(answer) for answer in answers], runner_name="trt")
        results.save(str(place / "outputs.json"))
        return
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        for k, (name, array) in enumerate(answer.items()):
            array = np.ascontiguousarray(array)
            if target == "qnn-net-run":
                ending = "_native.raw" if native else ".raw"
                file = place / f"Result_{number}" / (re.sub(r"[^A-Za-z0-9_]", "_", name) + ending)
            elif target == "snpe-net-run":
                file = place / f"Result_{number}" / f"{name}:0.raw"
            elif target == "qaic-runner":
                file = place / label(run) / f"{name}-activation-0-inf-0.bin"
            elif target == "trtexec":
                kinds = {"float32": "Float", "float16": "Half", "bfloat16": "BF16"}
                dims = ".".join(map(str, array.shape))
                kind = kinds.get(array.dtype.name, array.dtype.name.capitalize())
                file = place / label(run) / f"{name}.output.{dims}.{kind}.raw"
            elif target == "onnx":
                file = place / f"test_data_set_{number}" / f"output_{k}.pb"
            elif target == "npz":
                file = place / f"{label(run)}.npz"
            else:
                file = place / label(run) / f"{name}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_one(file, name, array)


def write_one(file, name, array):
    if file.suffix == ".npy":
        np.save(file, plain(array))
    elif file.suffix == ".npz":
        with zipfile.ZipFile(file, "a") as archive, archive.open(f"{name}.npy", "w") as member:
            np.lib.format.write_array(member, plain(array))
    elif file.suffix == ".pb":
        from onnx import numpy_helper

        file.write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    else:
        array.tofile(file)


def groups_of(folder):
    index = json.loads((folder / "pack.json").read_text())
    groups = {}
    for run in index["runs"]:
        groups.setdefault(run["group"], []).append(run)
    return index, groups


def run_device(folder, compute):
    """Read all inputs, call ``compute(run, inputs)`` for each run, write what it returns.

    The arrays that it returns are in the graph's dtype and order of axes.
    """
    index, groups = groups_of(folder)
    for group, runs in groups.items():
        shutil.rmtree(folder / "outputs" / group, ignore_errors=True)
        answers = []
        for run, inputs in zip(
            runs, read_inputs(folder, index["target"], group, runs), strict=True
        ):
            orders = {t["name"]: np.argsort(t["axes"]) for t in run["inputs"] if t["axes"]}
            graph = {n: a.transpose(orders[n]) if n in orders else a for n, a in inputs.items()}
            outputs = compute(run, graph)
            answers.append(
                {
                    t["name"]: in_file_form(outputs[t["name"]], t)
                    for t in run["outputs"]
                    if t["name"] in outputs
                }
            )
        write_outputs(folder, index["target"], group, runs, answers)


def in_file_form(array, tensor):
    array = array.astype(dtype_of(tensor["dtype"]))
    return array.transpose(tensor["axes"]) if tensor["axes"] else array


class Sessions:
    """The parts of an export in ONNX Runtime."""

    def __init__(self, export):
        self.export = Path(export)
        self.sessions = {}
        self.cache = {}

    def __call__(self, run, inputs):
        import onnxruntime

        part = run["part"]
        if part not in self.sessions:
            path = str(self.export / f"{part}.onnx")
            providers = ["CPUExecutionProvider"]
            self.sessions[part] = onnxruntime.InferenceSession(path, providers=providers)
        session = self.sessions[part]
        dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        feeds = {
            i.name: np.ascontiguousarray(
                inputs[i.name] if i.name in inputs else self.cache[i.name]
            ).astype(dtypes[i.type])
            for i in session.get_inputs()
        }
        outputs = dict(
            zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True)
        )
        self.cache = {  # as a device that carries its own
            name.replace("present.", "past_key_values."): array
            for name, array in outputs.items()
            if name.startswith("present.")
        }
        return outputs


def main():
    folder, export, *fault = sys.argv[1:]
    folder = Path(folder)
    run_device(folder, Sessions(export))
    if fault:
        from device_faults import FAULTS

        FAULTS[fault[0]](folder, np.random.default_rng(0))


if __name__ == "__main__":
    main()
