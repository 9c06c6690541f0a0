"""What tells one cell from another: all that its verdict depends on, as a hash.

Nothing is loaded or imported for it but the backends, which say their versions: a sweep of which
nothing has changed ends in a second or two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec

from qeff_proxy.artifact.export_folder import find_export
from qeff_proxy.artifact.manifest_schema import MANIFEST
from qeff_proxy.backends.registry import BUILTIN_BACKENDS, ENTRY_POINT_GROUP, load_backend
from qeff_proxy.common.code_digest import code_digest
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ProxyError
from qeff_proxy.export.cache_key import export_key
from qeff_proxy.load.adapter_files import find_model
from qeff_proxy.load.checkpoint_files import folder_named, identity_as, read_config_file
from qeff_proxy.parts import PROXIES
from qeff_proxy.plugins.entry_points import find_entry
from qeff_proxy.plugins.manager import PluginOrigin, Plugins
from qeff_proxy.sweep.plan import Cell


@dataclass(frozen=True)
class Identity:
    """What a cell is known by.

    Attributes:
        id: Of the cell.
        export: Of the export that it shares with other cells.
        versions: Of the packages and the backend that it depends on.
        missing: Why its model or its backend cannot be used on this machine.
    """

    id: str
    export: str
    versions: dict[str, str]
    missing: str = ""


@dataclass(frozen=True)
class _Source:
    identity: str
    dtype: str


@dataclass(frozen=True)
class _Nobody:
    plugin: str
    distribution: None = None
    version: None = None


def identify_cells(cells: Iterable[Cell]) -> dict[str, Identity]:
    """The identity of each cell, by its name.

    A model or a backend that cannot be found has an identity too, which changes once it is there.
    """
    files = cache(_file_hash)
    source = cache(_source_of)
    backend = cache(_backend_facts)
    shared = cache(partial(_export_facts, Plugins.discover()))
    identities = {}
    for cell in cells:
        setting = cell.setting
        model, model_type = source(cell.source, cell.allow_pickle, cell.trust_remote_code)
        export = shared(
            model_type, setting.dtype, setting.proxy, setting.opset, setting.taps or "layers"
        )
        export_id = _hash([model, export, cell.task, cell.cut_options])
        facts = {
            **backend(cell.backend, json.dumps(cell.options, sort_keys=True, default=str)),
            "files": {name: files(value) for name, value in cell.options.items()},
        }
        data = [files(item) for item in (*cell.input.audio, *cell.input.images)]
        calibration = setting.calibrate and files(setting.calibrate)
        settings = msgspec.to_builtins((setting, cell.piece, cell.options, cell.input))
        identities[cell.name] = Identity(
            _hash([export_id, cell.backend, facts, settings, data, calibration]),
            export_id,
            _stated(
                **{name: export[name] for name in ("qeff-proxy", "torch", "transformers", "onnx")},
                **{
                    "files of the model": _hash(model)[:12],
                    f"code of {export['plugin']['name'].partition(':')[0]}": export["plugin"][
                        "code"
                    ],
                    "code of qeff-proxy": export["code"],
                    **facts["versions"],
                },
            ),
            str(facts.get("missing", "")) if model_type else model,
        )
    return identities


def _source_of(source: str, allow_pickle: bool, trust_remote_code: bool) -> tuple[str, str]:
    """The hash of a model's files, and its model type."""
    try:
        export = find_export(folder_named(source))
        if export is not None:
            manifest = (export.folder / MANIFEST).read_bytes()
            return hashlib.sha256(manifest).hexdigest(), str(export.model["model_type"])
        folder, adapters = find_model(
            source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
        merged = [(adapter.folder, adapter.weight) for adapter in adapters]
        return identity_as(folder, "", merged), str(read_config_file(folder).get("model_type"))
    except (ProxyError, OSError, ValueError) as error:  # the cell itself says so
        return f"{source}: {error}", ""


def _export_facts(
    plugins: Plugins, model_type: str, dtype: str, proxy: str, opset: int | None, taps: str
) -> dict[str, Any]:
    """All but the checkpoint that an export depends on."""
    owner: PluginOrigin | _Nobody
    try:
        owner = plugins.origin(model_type)
    except ProxyError as error:  # two packages claim it; the cell says so
        owner = _Nobody(str(error))
    return export_key(_Source("", dtype), owner, PROXIES[proxy], opset, taps.split(","))


def _backend_facts(name: str, options: str) -> dict[str, Any]:
    """The versions of a backend, the code of its package, and the files that its options name."""
    try:
        entry = find_entry(ENTRY_POINT_GROUP, "backend", name, BUILTIN_BACKENDS)
        facts: dict[str, Any] = {"package": [entry.distribution, entry.version, entry.value]}
        code = code_digest(entry.value.partition(":")[0].partition(".")[0])
        if name == "torch":  # its version is among the export's; importing it takes seconds
            return {**facts, "versions": {}}
        backend = load_backend(name)
        named = backend.fingerprint(CompileOptions(backend=json.loads(options)))
        versions = {**backend.versions(), f"code of {entry.distribution}": str(code)}
        return {**facts, "versions": versions, "fingerprint": dict(named)}
    except Exception as error:  # noqa: BLE001 (its code may raise anything; the cell says so)
        return {"versions": {}, "missing": f"{type(error).__name__}: {error}"}


def _file_hash(value: Any) -> Any:
    """The hash of a file, or of a folder's files by size and time; ``None`` for other values."""
    path = Path(value) if isinstance(value, str) and "\0" not in value else None
    try:
        if path is None or not path.exists():
            return None
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        inner = sorted(each for each in path.rglob("*") if each.is_file())
        states = ((str(each), each.stat()) for each in inner)
        return _hash([(name, state.st_size, state.st_mtime_ns) for name, state in states])
    except OSError as error:
        return str(error)


def _stated(**versions: str | None) -> dict[str, str]:
    return {name: str(version) for name, version in versions.items() if version is not None}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
