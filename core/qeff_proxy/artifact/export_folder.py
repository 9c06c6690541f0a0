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
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.hashes import _ALGORITHM, hash_weights_file, sha256_of
from qeff_proxy.artifact.manifest_schema import MANIFEST, Export, read_manifest
from qeff_proxy.common.atomic_folder import HIDDEN, settle_folder
from qeff_proxy.common.file_errors import check_writable, reading
from qeff_proxy.common.last_use import mark_used
from qeff_proxy.errors import ArtifactError

#: Subfolders that a new export of the same folder takes over from the old one.
KEPT = ("io",)


def find_export(folder: Path) -> Export | None:
    """The export in a folder that may hold one, or ``None``; as `read_export`."""
    settle_folder(folder, KEPT)
    return read_export(folder) if (folder / MANIFEST).is_file() else None


def read_export(folder: Path) -> Export:
    """Read an export and check that it is complete.

    If an export to this folder was interrupted, it is recovered first.

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
        export = read_manifest(folder)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{manifest} is damaged: {error}", again) from error
    with reading(folder):
        _check_files(export, again)
    mark_used(manifest)
    return export


def _check_files(export: Export, again: str) -> None:
    """Check graphs by their hashes and weights by their sizes."""
    folder, manifest = export.folder, export.folder / MANIFEST
    for part in export.parts:
        path = folder / part.file
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", again)
        if sha256_of(path) != part.sha256:
            raise ArtifactError(
                f"{path} is damaged or was edited: its SHA-256 is not the one in {MANIFEST}",
                f"{again[:-1]}, or write the SHA-256 of an edited graph into {MANIFEST}.",
            )
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


def _mentions(graph: Path, weights: str) -> bool:
    """Whether a graph contains the name of the weights file that the manifest gives it."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(weights.encode()) >= 0


def enclosing_export(folder: Path) -> Path | None:
    """The export that ``folder`` is, or lies in; ``None`` if there is no such export."""
    for place in (folder, *folder.parents):
        if (place / MANIFEST).is_file() and any(True for _ in place.glob("*.onnx")):
            return place
    return None


def check_weights_of(export: Export) -> None:
    """Compare every weights file of an export with its hash.

    Raises:
        ArtifactError: One of them is not what was exported, or its hash is of an unknown algorithm.
    """
    for name, digest in export.hashes.items():
        if not digest.startswith(_ALGORITHM):
            raise ArtifactError(
                f"{export.folder / MANIFEST} has a hash of {name} that is not {_ALGORITHM}…",
                "Export the model again.",
            )
        with reading(export.folder):
            unchanged = hash_weights_file(export.folder / name) == digest
        if not unchanged:
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
    """The folder of an export: named by its model and a hash of its key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_home() / f"{_slug(source)}-{digest}"


def settle_home() -> None:
    """Recover or remove what killed exports of any model left in `cache_home` (`settle_folder`)."""
    for _, target, _ in HIDDEN.leftovers(cache_home()):
        if re.fullmatch(r".+-[0-9a-f]{16}", target.name):  # as `export_folder` names them
            settle_folder(target, KEPT)


def _slug(source: str) -> str:
    name = source.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def check_export_place(source: str, output: Path | None) -> None:
    """Refuse a place that cannot be written to, unless an export of the model may lie there.

    Args:
        source: The checkpoint, as the user named it.
        output: The export's folder, where it is not one below `cache_home`.

    Raises:
        ArtifactError: It can be neither written nor found there.
    """
    places = cache_home().glob(f"{_slug(source)}-*") if output is None else (output,)
    if not any((place / MANIFEST).is_file() for place in places):
        check_writable(output or cache_home())
