"""What ``export.json`` must be, field by field, and what in it must agree.

`docs/export-format.md` tells what each field means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from qeff_proxy.common.json_schema import (
    Check,
    FieldError,
    anything,
    count,
    entries,
    fields,
    file_name,
    items,
    matching,
    number,
    of_type,
    one_of,
    optional,
    parse_strictly,
    text,
)
from qeff_proxy.dump.format import DTYPES as TENSOR_DTYPES
from qeff_proxy.parts import DTYPES, TAPS, Kind, MaskKind

__all__ = ["SCHEMA", "check_manifest", "read_manifest"]

SCHEMA = 1

_SHA256 = matching(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")
_HASH = matching(r"[a-z0-9]+:[0-9a-f]{64}", "an algorithm and a hash, such as blake3:…")


def _axis(value: Any, where: str) -> Any:
    if type(value) is str and value:
        return value
    return count(value, where)


_TENSOR = fields({"name": text, "dtype": one_of(TENSOR_DTYPES), "shape": items(_axis)})
_MASK = fields({"name": text, "kind": one_of(get_args(MaskKind)), "size": optional(count)})
_PART = fields(
    {
        "name": matching(r"[a-z][a-z0-9_]{0,63}", "the name of a part"),
        "file": file_name,
        "weights": optional(file_name),
        "sha256": _SHA256,
        "inputs": items(_TENSOR, least=1),
        "outputs": items(_TENSOR, least=1),
        "masks": items(_MASK),
    }
)
_LAYERS = fields({"count": count, "verified": count, "kinds": items(anything)}, open_=True)
_VERIFIED = fields(
    {"max_difference": number, "largest_value": number, "positions": count}, open_=True
)
_CUT = fields(
    {},
    {
        "sites": entries(of_type(dict)),
        "verified": optional(_VERIFIED),
        "graphs": entries(optional(number)),
        "traced_layers": entries(count),
        "traced_whole": entries(text),
        "layers": _LAYERS,
        "stands_for": fields({"layers": count, "kept": count}, open_=True),
        "weights": text,
    },
    open_=True,
)
# Of the settings, those that the core itself reads; the others are of the flow's plugin.
_SETTINGS = fields(
    {},
    {"taps": items(one_of(TAPS)), "embedding_rows": count, "hidden_size": count}
    | {"most_positions": optional(count)},
    open_=True,
)
_MADE_BY = fields(
    {},
    {
        "identity": text,
        "kind": text,
        "dtype": text,
        "weights": text,
        "opset": optional(count),
        "taps": items(text),
        "plugin": of_type(dict),
    },
    open_=True,
)
_MANIFEST: Check = fields(
    {
        "schema": count,
        "kind": one_of(get_args(Kind)),
        "flow": text,
        "dtype": one_of(DTYPES),
        "model": fields({"source": text, "model_type": text, "architecture": text}),
        "parts": items(_PART, least=1),
        "files": entries(count, key=file_name),
        "hashes": entries(_HASH, key=file_name),
        "processor": items(file_name),
        "cut": _CUT,
        "settings": _SETTINGS,
        "made_by": _MADE_BY,
    }
)


def read_manifest(path: Path) -> dict[str, Any]:
    """The document in ``path``, checked.

    Raises:
        FieldError: It is no such document; names the field.
        ValueError: It is no JSON.
    """
    return check_manifest(parse_strictly(path.read_bytes()))


def check_manifest(value: Any) -> dict[str, Any]:
    """The document, if it is what ``export.json`` must be.

    Raises:
        FieldError: Names the field that is not.
    """
    of_type(dict)(value, "the document")
    if value.get("schema") != SCHEMA:
        raise FieldError(f"it has schema {value.get('schema')!r}, not {SCHEMA}")
    checked: dict[str, Any] = _MANIFEST(value, "the document")
    _check_parts(checked["parts"])
    made_by, settings = checked["made_by"], checked["settings"]
    for name, said in (*checked.items(), ("taps", settings.get("taps", []))):
        if name in {"kind", "dtype", "taps"} and made_by.get(name, said) != said:
            raise FieldError(f"{name!r} is {said!r}, which 'made_by' contradicts")
    names = [part["name"] for part in checked["parts"]]
    told = checked["cut"].get("graphs")
    if told is not None and sorted(told) != sorted(names):
        other = min(set(told) ^ set(names))
        raise FieldError(f"'parts' and 'graphs' of 'cut' do not agree on {other!r}")
    files = checked["files"]
    if files.keys() != checked["hashes"].keys():
        other = min(files.keys() ^ checked["hashes"].keys())
        raise FieldError(f"'files' and 'hashes' do not agree on {other!r}")
    for part in checked["parts"]:
        if part["weights"] is not None and part["weights"] not in files:
            raise FieldError(
                f"'weights' of the {part['name']} part is {part['weights']!r}, which is not in "
                "'files'"
            )
    return checked


def _check_parts(parts: list[dict[str, Any]]) -> None:
    """Names are unique, masks are inputs, and no part takes what only a later one gives."""
    for field in ("name", "file"):
        _check_unique([part[field] for part in parts], f"{field!r} of 'parts'")
    for index, part in enumerate(parts):
        inputs = [one["name"] for one in part["inputs"]]
        outputs = [one["name"] for one in part["outputs"]]
        _check_unique(inputs, f"'inputs' of the {part['name']} part")
        _check_unique(outputs, f"'outputs' of the {part['name']} part")
        for mask in part["masks"]:
            if mask["name"] not in inputs:
                raise FieldError(
                    f"'masks' of the {part['name']} part names {mask['name']!r}, which is none of "
                    "its inputs"
                )
        before = {one["name"] for other in parts[:index] for one in other["outputs"]}
        after = {one["name"]: other for other in parts[index + 1 :] for one in other["outputs"]}
        for name in inputs:
            if name not in before and name in after:
                later = after[name]["name"]
                raise FieldError(
                    f"'parts' has {part['name']} before {later}, whose {name} it takes"
                )


def _check_unique(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FieldError(f"{where} has {twice!r} twice")
