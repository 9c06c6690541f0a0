"""An export on disk: ``export.json`` and the files it names.

::

    <model>-<hash>/
        export.json              what this is, written last
        embedding.onnx           input_ids → inputs_embeds
        body.onnx                inputs_embeds, masks, cache → last_hidden_state, cache
        lm_head.onnx             last_hidden_state → logits
        body.safetensors         the body's weights, to be handed over alone
        vocabulary.safetensors   the weights of embedding and LM head, tied ones once
        processor/               config, tokenizer and generation settings
        compiled/<backend>-…/    what `compile` made
        io/<run>/                dumps
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.hashes import _ALGORITHM, hash_weights_file, sha256_of
from qeff_proxy.artifact.manifest_schema import SCHEMA, read_manifest
from qeff_proxy.common.atomic_folder import settle_folder
from qeff_proxy.errors import ArtifactError
from qeff_proxy.parts import MaskSpec, TensorSpec

__all__ = [
    "Export",
    "ExportedPart",
    "cache_home",
    "check_weights_of",
    "enclosing_export",
    "export_folder",
    "find_export",
    "read_export",
]

MANIFEST = "export.json"
#: Subfolders that a new export of the same folder takes over from the old one.
KEPT = ("io",)


@dataclass(frozen=True)
class ExportedPart:
    """A part as a file: the counterpart of `qeff_proxy.parts.Part`.

    Attributes:
        name: The part's name.
        file: Its ONNX file, in the export's folder.
        weights: The weights file it points into, or ``None`` where it has no weights.
        sha256: Of the ONNX file.
        inputs: What it takes.
        outputs: What it gives.
        masks: Which inputs are attention masks.
    """

    name: str
    file: str
    weights: str | None
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    masks: tuple[MaskSpec, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The part as a JSON object."""
        return {
            "name": self.name,
            "file": self.file,
            "weights": self.weights,
            "sha256": self.sha256,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "masks": [mask.to_json() for mask in self.masks],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExportedPart:
        """The part that `to_json` wrote, once checked (`qeff_proxy.artifact.manifest_schema`)."""
        return cls(
            value["name"],
            value["file"],
            value["weights"],
            value["sha256"],
            tuple(TensorSpec.from_json(spec) for spec in value["inputs"]),
            tuple(TensorSpec.from_json(spec) for spec in value["outputs"]),
            tuple(MaskSpec.from_json(mask) for mask in value["masks"]),
        )


@dataclass(frozen=True)
class Export:
    """An export, read from its folder.

    Attributes:
        folder: Where it lies.
        kind: ``"split"``, ``"stub"`` or ``"whole"``.
        flow: How its parts are run.
        dtype: Of weights and activations.
        model: Source, model type and architecture of the checkpoint.
        parts: In the order they run.
        files: Weights file → bytes.
        cut: The sites, and what was verified of the cut.
        settings: What the flow needs besides.
        made_by: Versions of what made it, and the plugin that did.
        hashes: Weights file → algorithm and hash, ``"blake3:…"``; checked when it is compiled, not
            when it is opened.
        processor: Names of the files that were written to `processor_folder`.
    """

    folder: Path
    kind: str
    flow: str
    dtype: str
    model: dict[str, Any]
    parts: tuple[ExportedPart, ...]
    files: dict[str, int]
    cut: dict[str, Any]
    settings: dict[str, Any]
    made_by: dict[str, Any]
    hashes: dict[str, str] = field(default_factory=dict)
    processor: tuple[str, ...] = ()

    @property
    def processor_folder(self) -> Path:
        """Where config, tokenizer and generation settings lie."""
        return self.folder / "processor"

    def part(self, name: str) -> ExportedPart:
        """The part called ``name`` (`KeyError` where there is none)."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """What stands in ``export.json``."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "flow": self.flow,
            "dtype": self.dtype,
            "model": self.model,
            "parts": [part.to_json() for part in self.parts],
            "files": self.files,
            "hashes": self.hashes,
            "processor": list(self.processor),
            "cut": self.cut,
            "settings": self.settings,
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, folder: Path, value: Mapping[str, Any]) -> Export:
        """The export in ``folder`` that `to_json` wrote, once checked."""
        return cls(
            folder,
            value["kind"],
            value["flow"],
            value["dtype"],
            value["model"],
            tuple(ExportedPart.from_json(part) for part in value["parts"]),
            value["files"],
            value["cut"],
            value["settings"],
            value["made_by"],
            value["hashes"],
            tuple(value["processor"]),
        )

    def write_manifest(self) -> None:
        """Write ``export.json`` into the folder."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")


def find_export(folder: Path) -> Export | None:
    """The export in a folder that may hold one, or ``None``; as `read_export`."""
    settle_folder(folder, KEPT)
    return read_export(folder) if (folder / MANIFEST).is_file() else None


def read_export(folder: Path) -> Export:
    """Read an export and check that it is whole.

    What an interrupted export left beside it is recovered first.

    Raises:
        ArtifactError: There is no export, it is damaged, or this version cannot read it.
    """
    settle_folder(folder, KEPT)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ArtifactError(
            f"{folder} holds no export", "Run qeff-proxy export first, or name another folder."
        )
    again = "Export the model again."
    try:
        export = Export.from_json(folder, read_manifest(manifest))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{manifest} is damaged: {error}", again) from error
    for part in export.parts:
        path = folder / part.file
        if not path.is_file() or sha256_of(path) != part.sha256:
            raise ArtifactError(f"{path} is missing or damaged", again)
        if part.weights is not None and not _mentions(path, part.weights):
            raise ArtifactError(
                f"{manifest} is damaged: 'weights' of the {part.name} part is {part.weights!r}, "
                f"which {part.file} does not point into",
                again,
            )
    for name, size in export.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ArtifactError(f"{path} is missing or does not have its {size} bytes", again)
    return export


def _mentions(graph: Path, weights: str) -> bool:
    """Whether a graph names the weights file that it is said to point into."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(weights.encode()) >= 0


def enclosing_export(folder: Path) -> Path | None:
    """The export that ``folder`` is, or lies in; ``None`` where there is none."""
    for place in (folder, *folder.parents):
        if (place / MANIFEST).is_file() and any(True for _ in place.glob("*.onnx")):
            return place
    return None


def check_weights_of(export: Export) -> None:
    """Hold every weights file of an export against its hash.

    Raises:
        ArtifactError: One of them is not what was exported, or its hash is none that is known.
    """
    for name, digest in export.hashes.items():
        if not digest.startswith(_ALGORITHM):
            raise ArtifactError(
                f"{export.folder / MANIFEST} has a hash of {name} that is not {_ALGORITHM}…",
                "Export the model again.",
            )
        if hash_weights_file(export.folder / name) != digest:
            raise ArtifactError(
                f"{export.folder / name} is not what was exported: its bytes have changed",
                "Export the model again.",
            )


def cache_home() -> Path:
    """``QEFF_HOME``, else ``qeff-proxy`` in the user's cache folder (XDG)."""
    home = os.environ.get("QEFF_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qeff-proxy"


def export_folder(source: str, key: Mapping[str, Any]) -> Path:
    """The folder of an export: named by its model and a hash of all that shapes it."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    slug = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", source.rstrip("/").split("/")[-1]).strip("-.") or "model"
    )
    return cache_home() / f"{slug}-{digest}"
