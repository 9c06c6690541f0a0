"""The document ``export.json``: its types, and the checks of one field against another.

`docs/export-format.md` says what each field means.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from qeff_proxy.common.json_schema import (
    Count,
    FieldError,
    FileName,
    Text,
    check_fields,
    parse_strictly,
    plain_json,
    read_as,
)
from qeff_proxy.common.shown import Shown
from qeff_proxy.dump.format import DTYPES as TENSOR_DTYPES
from qeff_proxy.parts import Dtype, Kind, MaskSpec, TensorSpec, is_tap

MANIFEST = "export.json"
_SCHEMA = 1
#: Fields of an export that are no part of the document.
NO_ADAPTER: dict[str, Any] = {"adapter": {}, "adapter_name": ""}
_HASH = re.compile(r"[a-z0-9]+:[0-9a-f]{64}")
#: In the order in which the manifest has them.
_FIELDS = (
    *("kind", "flow", "dtype", "model", "parts", "files", "hashes", "processor"),
    *("cut", "settings", "made_by"),
)


@dataclass(frozen=True)
class ExportedPart:
    """A part as a file: the counterpart of `qeff_proxy.parts.Part`.

    Attributes:
        name: The part's name.
        file: Its ONNX file, in the export's folder.
        weights: The weights file it points into, or ``None`` where it has no weights.
        sha256: Of the ONNX file.
        inputs: Its inputs.
        outputs: Its outputs.
        masks: Which inputs are attention masks.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_]{0,63}\Z")]
    file: FileName
    weights: FileName | None
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    masks: tuple[MaskSpec, ...] = ()


@dataclass(frozen=True, repr=False)
class Export(Shown):
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
        settings: The settings of the flow.
        made_by: Versions of what made it, and the plugin that did.
        hashes: Weights file → algorithm and hash, ``"blake3:…"``; checked by `compile`, not by a
            reader.
        processor: Names of the files that were written to `processor_folder`.
        adapter: The A and B that inputs of parts take in a run, by name; not part of the document.
        adapter_name: Where they come from; empty for the base model.
    """

    folder: Path
    kind: str
    flow: Text
    dtype: str
    model: dict[str, Any]
    parts: Annotated[tuple[ExportedPart, ...], msgspec.Meta(min_length=1)]
    files: dict[FileName, Count]
    cut: dict[str, Any]
    settings: dict[str, Any]
    made_by: dict[str, Any]
    hashes: dict[FileName, str] = field(default_factory=dict)
    processor: tuple[FileName, ...] = ()
    adapter: dict[str, Any] = field(default_factory=dict, compare=False)
    adapter_name: str = ""

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

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {
            "model": self.model.get("source"),
            "kind": f"{self.kind}, {self.dtype}",
            "parts": ", ".join(part.name for part in self.parts),
            "bytes": f"{sum(self.files.values()):,}",
            "folder": self.folder,
        }

    def to_json(self) -> dict[str, Any]:
        """The content of ``export.json``."""
        return {"schema": _SCHEMA, **{name: plain_json(getattr(self, name)) for name in _FIELDS}}

    def write_manifest(self) -> None:
        """Write ``export.json`` into the folder."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")


class _Model(TypedDict):
    source: Text
    model_type: Text
    architecture: Text


# The other objects may have more fields: of what was measured, and of the plugins of flows.
class _Verified(TypedDict):
    max_difference: float
    largest_value: float
    positions: Count


class _Layers(TypedDict):
    count: Count
    verified: Count
    kinds: list[Any]


class _StandsFor(TypedDict):
    layers: Count
    kept: Count


class _Cut(TypedDict, total=False):
    sites: dict[Text, dict[str, Any]]
    verified: _Verified | None
    graphs: dict[Text, float | None]
    check_sizes: dict[Text, dict[Text, Count]]
    traced_layers: dict[Text, Count]
    traced_whole: dict[Text, Text]
    layers: _Layers
    stands_for: _StandsFor
    weights: Text


class _Settings(TypedDict, total=False):
    taps: list[str]
    embedding_rows: Count
    hidden_size: Count
    most_positions: Count | None


class _MadeBy(TypedDict, total=False):
    identity: Text
    kind: Text
    dtype: Text
    weights: Text
    opset: Count | None
    taps: list[Text]
    plugin: dict[str, Any]


class _Manifest(TypedDict):
    kind: Kind
    dtype: Dtype
    model: _Model
    cut: _Cut
    settings: _Settings
    made_by: _MadeBy


def read_manifest(folder: Path) -> Export:
    """The export in ``folder``, its manifest checked.

    Raises:
        FieldError: A field is wrong; names it.
        ValueError: The manifest is not JSON.
    """
    value = parse_strictly((folder / MANIFEST).read_bytes())
    schema = value.pop("schema", None) if isinstance(value, dict) else None
    if schema != _SCHEMA:
        raise FieldError(f"it has schema {schema!r}, not {_SCHEMA}")
    own = {"folder": str(folder), **NO_ADAPTER}
    if others := own.keys() & value.keys():
        raise FieldError(f"the document has an unknown {min(others)!r}")
    export = read_as(Export, {**own, **value})
    check_fields(_Manifest, value, "the document")
    read_as(_Model, export.model, "'model'")
    _check_parts(export.parts)
    _check_agreement(export)
    return export


def _check_agreement(export: Export) -> None:
    taps = export.settings.get("taps", [])
    if unknown := [tap for tap in taps if not is_tap(tap)]:
        raise FieldError(f"'taps' of 'settings' has {unknown[0]!r}, which is no tap")
    for name, value in (("kind", export.kind), ("dtype", export.dtype), ("taps", taps)):
        if export.made_by.get(name, value) != value:
            raise FieldError(f"{name!r} is {value!r}, which 'made_by' contradicts")
    graphs = export.cut.get("graphs")
    names = {part.name for part in export.parts}
    if graphs is not None and graphs.keys() != names:
        raise FieldError(
            f"'parts' and 'graphs' of 'cut' do not agree on {min(graphs.keys() ^ names)!r}"
        )
    files = export.files.keys()
    if files != export.hashes.keys():
        raise FieldError(
            f"'files' and 'hashes' do not agree on {min(files ^ export.hashes.keys())!r}"
        )
    for name, digest in export.hashes.items():
        if not _HASH.fullmatch(digest):
            raise FieldError(
                f"{name!r} of 'hashes' is not an algorithm and a hash, such as blake3:…"
            )
    for part in export.parts:
        if part.weights is not None and part.weights not in files:
            raise FieldError(
                f"'weights' of the {part.name} part is {part.weights!r}, which is not in 'files'"
            )


def _check_parts(parts: tuple[ExportedPart, ...]) -> None:
    """Names are unique, masks are inputs, and no part takes an output of a later part."""
    _check_unique([part.name for part in parts], "'name' of 'parts'")
    _check_unique([part.file for part in parts], "'file' of 'parts'")
    for index, part in enumerate(parts):
        inputs = [spec.name for spec in part.inputs]
        _check_unique(inputs, f"'inputs' of the {part.name} part")
        _check_unique([spec.name for spec in part.outputs], f"'outputs' of the {part.name} part")
        for spec in (*part.inputs, *part.outputs):
            if spec.dtype not in TENSOR_DTYPES:
                raise FieldError(
                    f"'dtype' of {spec.name} of the {part.name} part is {spec.dtype!r}, which is "
                    f"none of {', '.join(TENSOR_DTYPES)}"
                )
        for mask in part.masks:
            if mask.name not in inputs:
                raise FieldError(
                    f"'masks' of the {part.name} part names {mask.name!r}, which is none of its "
                    "inputs"
                )
        before = {spec.name for other in parts[:index] for spec in other.outputs}
        after = {spec.name: other for other in parts[index + 1 :] for spec in other.outputs}
        for name in inputs:
            if name not in before and name in after:
                raise FieldError(
                    f"'parts' has {part.name} before {after[name].name}, whose {name} it takes"
                )


def _check_unique(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FieldError(f"{where} has {twice!r} twice")
