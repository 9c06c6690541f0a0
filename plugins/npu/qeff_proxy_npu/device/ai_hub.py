"""Qualcomm's AI Hub: a dataset in an HDF5 file, one entry a run.

``data/<n>/batch_<run>`` holds the n-th tensor of a run; the group ``data/<n>`` has its ``name``,
its ``order`` and ``batch_count``. ``hub.upload_dataset`` takes such a file and
``job.download_output_data`` writes one.

Source: ``qai_hub/util/dataset_entries_converters.py`` of the package qai-hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qeff_proxy.common.messages import counted
from qeff_proxy.device.index import PackedRun
from qeff_proxy.device.target import Found, Group, Reader, Target, check_within, raw_size
from qeff_proxy.dump.format import AS_BITS
from qeff_proxy.errors import DumpError, UsageError

INPUTS, OUTPUTS = "inputs.h5", "outputs.h5"


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise UsageError(
            "AI Hub's datasets need the package h5py", "pip install 'qeff-proxy-npu[aihub]'"
        ) from error
    return h5py


class AiHubTarget(Target):
    """AI Hub."""

    name = "ai-hub"
    one_shape = True

    def file_dtype(self, dtype: str) -> str:
        """32 bits for what has 64, since AI Hub has no larger integers; NumPy's dtypes only."""
        return "float32" if dtype in AS_BITS else {"int64": "int32"}.get(dtype, dtype)

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write one dataset."""
        group.place.mkdir()
        with _h5py().File(group.place / INPUTS, "x") as file:
            for number, tensor in enumerate(group.runs[0].inputs):
                entry = file.create_group(f"data/{number}")
                entry.attrs["order"] = number
                entry.attrs["name"] = tensor.name
                entry.attrs["batch_count"] = len(group.runs)
            places = {tensor.name: number for number, tensor in enumerate(group.runs[0].inputs)}
            for batch, run in enumerate(group.runs):
                for tensor, array in read(run, "in"):
                    file[f"data/{places[tensor.name]}"].create_dataset(f"batch_{batch}", data=array)
        return [
            "# In Python, with the compiled model and a device of hub.get_devices():",
            f'# inputs = hub.upload_dataset("{group.name}/{INPUTS}")',
            "# job = hub.submit_inference_job(model, device, inputs)",
            f'# job.download_output_data("outputs/{group.name}/{OUTPUTS}")',
        ]

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the tensors of each entry."""
        path = group.outputs / OUTPUTS
        if not path.exists():
            return
        check_within(path, group.outputs)
        found = _read(path, len(group.runs))
        for number, run in enumerate(group.runs):
            yield run, found[number]


def _read(path: Path, runs: int) -> list[list[Found]]:
    h5py = _h5py()
    found: list[list[Found]] = [[] for _ in range(runs)]
    raw_size(path)
    try:
        with h5py.File(path, "r") as file:
            for entry in file["data"].values():
                name = str(entry.attrs["name"])
                count = int(entry.attrs["batch_count"])
                if count != runs:
                    raise DumpError(
                        f"{path} has {counted(count, 'entry', 'entries')} of {name}, and {runs} "
                        f"were packed, so it cannot be told which step each is",
                        "Run the whole dataset again.",
                    )
                for number in range(runs):
                    data = _dataset(h5py, entry, f"batch_{number}", path)
                    where = f"{name!r} of run {number} of {path}"
                    load = _loader(path, data.name, where)
                    found[number].append(Found(name, where, shape=tuple(data.shape), load=load))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DumpError(f"{path} is not a dataset of AI Hub: {error}") from error
    return found


def _dataset(h5py: Any, entry: Any, name: str, path: Path) -> Any:
    """A dataset whose elements lie in the file itself."""
    link = entry.get(name, getlink=True)
    data = entry[name]
    if not isinstance(link, h5py.HardLink) or not isinstance(data, h5py.Dataset) or data.external:
        raise DumpError(f"{name} of {path} points to another file")
    return data


def _loader(path: Path, name: str, where: str) -> Callable[[], NDArray[Any]]:
    def load() -> NDArray[Any]:
        try:
            with _h5py().File(path, "r") as file:
                return np.asarray(file[name])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise DumpError(f"{where} is damaged: {error}") from error

    return load
