"""What a verification by layer has computed, kept until it ends: an interrupted run goes on there.

One file a layer, below ``io/`` of the export: of each run, the values that later layers or parts
take, and the results so far. The folder's name has a hash of all that these depend on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.arrays import to_array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.common.atomic_folder import held
from qeff_proxy.common.code_digest import code_digest
from qeff_proxy.common.file_errors import writing
from qeff_proxy.verify.by_layer.part_run import Step

if TYPE_CHECKING:
    import torch

#: The name of the reference's run among the others.
REFERENCE = "reference"
_PREFIX = "by-layer-"


@dataclass(frozen=True)
class Entry:
    """One layer.

    Attributes:
        values: By run, what is kept of the layer's outputs in each call.
        states: By run, its state as JSON values.
    """

    values: Mapping[str, Sequence[Step]]
    states: Mapping[str, Any]


class Journal:
    """The layers that ran.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_mine = False

    @classmethod
    def of(
        cls, export: Export, tensors: Mapping[str, torch.Tensor], settings: Sequence[object]
    ) -> Journal:
        """The journal of a run.

        Args:
            export: What is verified.
            tensors: The input.
            settings: All else that the results depend on; their ``repr`` tells them apart.
        """
        import torch

        parts = [part.sha256 for part in export.parts]
        code = code_digest("qeff_proxy")
        key = hashlib.sha256(repr((dict(export.hashes), parts, settings, code)).encode())
        for name, tensor in sorted(tensors.items()):
            array = np.ascontiguousarray(to_array(torch.as_tensor(tensor)))
            key.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        return cls(export.folder / "io" / f"{_PREFIX}{key.hexdigest()[:12]}")

    @contextmanager
    def held(self, *, anew: bool) -> Iterator[None]:
        """Use the journal while this is open; an equal run beside this one has none.

        Journals of other runs on this export are removed, but for those of runs that go on.

        Args:
            anew: Forget what it holds.
        """
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with held(self._folder) as self._is_mine:
            with writing(self._folder):
                for other in self._folder.parent.glob(f"{_PREFIX}*"):
                    with held(other) as is_free:
                        if is_free:
                            shutil.rmtree(other)
                for path in self._folder.iterdir() if anew and self._is_mine else ():
                    path.unlink()
            yield

    def read(self, layer: str) -> Entry | None:
        """A layer, if it ran."""
        if not self._is_mine:
            return None
        try:
            with (
                (self._folder / f"{layer}.npz").open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                index = json.loads(arrays["index"].tobytes())
                values = {
                    run: [{name: arrays[key] for name, key in call.items()} for call in calls]
                    for run, calls in index["values"].items()
                }
                return Entry(values, index["states"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # it did not run, or its file is damaged: it runs again

    def write(self, layer: str, entry: Entry) -> None:
        """Keep a layer.

        Raises:
            ArtifactError: The file cannot be written.
        """
        arrays: dict[str, Any] = {}
        values: dict[str, list[dict[str, str]]] = {}
        for run, calls in entry.values.items():
            values[run] = []
            for call in calls:
                keys = {name: f"{len(arrays) + number}" for number, name in enumerate(call)}
                arrays |= {keys[name]: array for name, array in call.items()}
                values[run].append(keys)
        if not self._is_mine or any(array.dtype.kind == "V" for array in arrays.values()):
            return  # NumPy's files hold no bfloat16
        index = json.dumps({"values": values, "states": entry.states}).encode()
        path = self._folder / f"{layer}.partial"
        with writing(path):
            with path.open("wb") as file:
                np.savez(file, index=np.frombuffer(index, np.uint8), **arrays)
            path.replace(path.with_suffix(".npz"))

    def remove(self) -> None:
        """Forget the layers: the run is complete."""
        if self._is_mine:
            shutil.rmtree(self._folder, ignore_errors=True)
