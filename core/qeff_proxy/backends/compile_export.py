"""Compile: from an export to what a backend runs, and from there to sessions.

What is compiled lies in ``compiled/<backend>-<hash>/`` of the export, with a ``compile.json``
written last. The same request again is a lookup.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.backends.backend import Backend
from qeff_proxy.backends.lengths import has_cache, with_fixed_shapes
from qeff_proxy.backends.recipe import OPTION, check_recipe
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.atomic_folder import locked, recover_folder, staged_folder
from qeff_proxy.common.code_digest import code_digest
from qeff_proxy.common.file_errors import opening, reading
from qeff_proxy.common.last_use import mark_used
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.plugins.hooks import Hooks

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.session.session import Session

#: What says how a folder was compiled.
COMPILED = "compile.json"


@dataclass(frozen=True)
class Compiled:
    """Parts, compiled for a backend.

    Attributes:
        export: What was compiled.
        backend: For which backend, by name.
        options: How.
        folder: Where the result lies.
        was_there: Whether it had been compiled before.
    """

    export: Export
    backend: str
    options: CompileOptions
    folder: Path
    was_there: bool = False


def compile_export(
    export: Export,
    backend: str = "onnxruntime",
    options: CompileOptions | None = None,
    *,
    force: bool = False,
    check: bool = False,
    wait: bool = True,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Compiled:
    """Compile every part of an export.

    Args:
        export: What to compile.
        backend: The backend's name.
        options: Shapes, cores, and what only this backend understands.
        force: Compile again even where the same was compiled already.
        check: Compile again where the contents of compiled files have changed; otherwise only their
            sizes and times are compared.
        wait: Wait for another run that compiles the same; what it compiled serves.
        progress: Called with each stage as it starts.

    Raises:
        BackendError: The backend is missing, or refuses a part.
        UsageError: An option is unknown, or its value is wrong.
        ArtifactError: The folder cannot be written, or is in use and ``wait`` is false.
    """
    options = _within_positions(export, options or CompileOptions())
    implementation = load_backend(backend)
    implementation.check_options(backend, options)
    if implementation.needs_fixed_shapes(options):
        options = fixed_lengths(export, options)
    key: dict[str, Any] = {
        "backend": backend,
        "versions": dict(implementation.versions()),
        "code": code_of(implementation),
        "options": _without_recipe(options).to_json(),
        "parts": {part.name: part.sha256 for part in export.parts},
    }
    with reading(export.folder):
        key["weights"] = {name: _state_of(export.folder / name) for name in export.files}
    fingerprint = dict(implementation.fingerprint(options))
    recipe = check_recipe(export, backend, options)
    if recipe is not None:
        fingerprint["recipe"] = recipe
    if fingerprint:
        key["inputs"] = fingerprint
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    target = export.folder / "compiled" / f"{backend}-{digest}"
    there = Compiled(export, backend, options, target, was_there=True)
    if not force and _is_whole(target, key):
        if not check or _has_its_contents(target):
            mark_used(target / COMPILED)
            return there  # without the lock, so that what is whole can be used side by side
        warnings.warn(
            f"the files in {target} are not what was compiled: they are compiled again",
            UserWarning,
            stacklevel=2,
        )
        force = True
    with locked(target, progress if wait else None, "compilation"):
        recover_folder(target)
        if not force and _is_whole(target, key):
            return there
        from qeff_proxy.artifact.export_folder import check_weights_of
        from qeff_proxy.artifact.hashes import hash_weights_file

        progress("checking weights")
        check_weights_of(export)
        with staged_folder(target, COMPILED) as folder:
            for part in export.parts:
                progress(f"compiling {part.name}")
                implementation.compile(export, part, options, folder)
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(folder)): path for path in paths}
            states = {name: _state_of(path) for name, path in files.items()}
            hashes = {name: hash_weights_file(path) for name, path in files.items()}
            value = {**key, "files": states, "hashes": hashes}
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (folder / COMPILED).write_text(text, encoding="utf-8")
    return Compiled(export, backend, options, target)


def _without_recipe(options: CompileOptions) -> CompileOptions:
    """The options without the path of a recipe, whose content counts."""
    others = {name: value for name, value in options.backend.items() if name != OPTION}
    return replace(options, backend=others)


def code_of(backend: Backend) -> dict[str, str | None]:
    """Package → hash of its code, for the backend's own and those of its base classes."""
    classes = [base for base in type(backend).__mro__ if issubclass(base, Backend)]
    packages = sorted({base.__module__.partition(".")[0] for base in classes})
    return {package: code_digest(package) for package in packages}


def fixed_lengths(export: Export, options: CompileOptions) -> CompileOptions:
    """The options as a backend of fixed shapes needs them: with all lengths."""
    if not has_cache(export.parts):
        return options
    return with_fixed_shapes(options, _positions_of(export))


def _positions_of(export: Export) -> int | None:
    """The model's number of positions; ``None`` if it has no limit."""
    if "most_positions" in export.settings:
        found: int | None = export.settings["most_positions"]
        return found
    from qeff_proxy.load.load_model import load_config, most_positions

    return most_positions(load_config(export.processor_folder))  # an export of an older version


def _within_positions(export: Export, options: CompileOptions) -> CompileOptions:
    """The options, with ``ctx_len`` no longer than the model's positions.

    Beyond them some backends fail during a run, and others go on with wrong numbers.
    """
    if options.ctx_len is None or not has_cache(export.parts):
        return options
    most = _positions_of(export)
    if most is None or options.ctx_len <= most:
        return options
    warnings.warn(
        f"ctx_len {options.ctx_len} is more than the {most} positions that "
        f"{export.model['source']} has; {most} are used",
        UserWarning,
        stacklevel=3,
    )
    chunk = options.prefill_seq_len
    return replace(
        options, ctx_len=most, prefill_seq_len=None if chunk is None else min(chunk, most)
    )


def _is_whole(folder: Path, key: dict[str, Any]) -> bool:
    path = folder / COMPILED
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        files = found.pop("files")
        found.pop("hashes", None)
        states = {name: _state_of(folder / name) for name in files}
    except (ValueError, AttributeError, KeyError, TypeError, OSError):
        return False
    return bool(found == key and files == states)


def _has_its_contents(folder: Path) -> bool:
    """Whether the files of a folder that is whole have the hashes that were noted, if any were."""
    from qeff_proxy.artifact.hashes import hash_weights_file  # it needs NumPy, as listings do not

    hashes = json.loads((folder / COMPILED).read_text(encoding="utf-8")).get("hashes", {})
    return all(hash_weights_file(folder / name) == digest for name, digest in hashes.items())


def _state_of(path: Path) -> list[int]:
    """Size and time of change: a changed file is compiled, and checked, again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def open_sessions(compiled: Compiled, hooks: Hooks | None = None) -> Iterator[dict[str, Session]]:
    """A session per part, closed at the end; ``hooks`` are for backends that cut the model."""
    backend = load_backend(compiled.backend)
    if hooks is not None:
        backend.use_hooks(hooks)
    sessions: dict[str, Session] = {}
    with ExitStack() as stack:
        for part in compiled.export.parts:
            with opening(compiled.folder if compiled.was_there else None):
                session = backend.open(compiled.export, part, compiled.options, compiled.folder)
            stack.callback(session.close)
            sessions[part.name] = session
        yield sessions
