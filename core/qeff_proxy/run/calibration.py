"""Calibration: the user's own inputs, as dumps that a quantizing backend reads.

A backend that quantizes has the option ``calibration``: a folder of dumps. `with_calibration`
returns it for dumps, and makes it for prompts, images or sounds: they run once in float32 on ONNX
Runtime, and every tensor is dumped below ``io/`` of the export. The same inputs again are a lookup.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import Compiled, compile_export, fixed_lengths
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.atomic_folder import locked, staged_folder
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump.format import MANIFEST
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled

OPTION = "calibration"
#: The prompt of an image that comes without one.
IMAGE_PROMPT = "Describe this image in detail."
#: Tokens that are generated for each prompt.
NEW_TOKENS = 16
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
_SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}
_DONE = "calibration.json"


def takes_calibration(backend: str) -> bool:
    """Whether a backend can be calibrated."""
    return OPTION in load_backend(backend).options


def with_calibration(
    export: Export,
    hooks: Hooks,
    backend: str,
    options: CompileOptions,
    given: Any,
    *,
    processor: Any = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> CompileOptions:
    """The options with the folder of dumps to calibrate on.

    Args:
        export: What is compiled.
        hooks: Of its model type.
        backend: For which backend.
        options: How.
        given: The folder of a dump, or of dumps; a file of prompts, one a line; an image or a
            sound, or a folder of such files; a `Request`; or a list of prompts or requests.
            ``None``: nothing.
        processor: The checkpoint's, where it is loaded already.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with each stage as it starts.

    Raises:
        UsageError: The backend cannot be calibrated, or ``given`` is none of these.
        ProxyError: The inputs cannot be run.
    """
    if given is None:
        return options
    implementation = load_backend(backend)
    if OPTION not in implementation.options:
        raise UsageError(
            f"backend {backend!r} cannot be calibrated", "Leave --calibrate (calibration=) out."
        )
    if isinstance(given, str | Path) and _holds_dumps(Path(given)):
        return _with_folder(options, Path(given))
    requests = requests_of(given)
    if implementation.needs_fixed_shapes(options):
        options = fixed_lengths(export, options)
    context = options.ctx_len
    digest = hashlib.sha256(json.dumps([context, NEW_TOKENS]).encode())
    for request in requests:
        digest.update(_digest_of(request))
    folder = export.folder / "io" / f"calibration-{digest.hexdigest()[:16]}"
    if not (folder / _DONE).is_file():
        progress("running the calibration inputs")
        if processor is None:
            processor = _processor_of(export, trust_remote_code)
        compiled = compile_export(export, "onnxruntime", CompileOptions(ctx_len=context))
        with locked(folder, progress, "calibration"):
            if not (folder / _DONE).is_file():
                _run(compiled, hooks, requests, folder, processor)
    return _with_folder(options, folder)


def requests_of(given: Any) -> list[Request]:
    """Prompts, images, sounds or requests, as requests.

    Raises:
        UsageError: It is nothing of the kind, or empty.
    """
    if isinstance(given, Request):
        return [given]
    if isinstance(given, str | Path):
        found = _requests_in(Path(given))
    else:
        found = [Request(prompts=(one,)) if isinstance(one, str) else one for one in given]
    if not found or not all(isinstance(one, Request) for one in found):
        raise UsageError(
            f"{given!r} holds nothing to calibrate on" if isinstance(given, str | Path)
            else "calibration is no list of prompts or requests",
            "Give prompts, one a line, images, sounds, or a dump.",
        )  # fmt: skip
    return found


def _requests_in(path: Path) -> list[Request]:
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.is_file())
        return [request for one in files for request in _requests_in(one)]
    if not path.is_file():
        raise UsageError(
            f"{path} is not there to calibrate on", "Give a file of prompts, or a dump's folder."
        )
    ending = path.suffix.lower()
    if ending in _IMAGES:
        return [Request(prompts=(IMAGE_PROMPT,), images=(str(path),))]
    if ending in _SOUNDS:
        return [Request(audio=(str(path),))]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no text to calibrate on", "Give prompts, one a line, images or sounds."
        ) from error
    return [Request(prompts=(line,)) for line in lines if line.strip()]


def _holds_dumps(path: Path) -> bool:
    return path.is_dir() and (
        (path / MANIFEST).is_file() or any(True for _ in path.glob(f"*/{MANIFEST}"))
    )


def _with_folder(options: CompileOptions, folder: Path) -> CompileOptions:
    return replace(options, backend={**options.backend, OPTION: str(folder.absolute())})


def _processor_of(export: Export, trust_remote_code: bool) -> Any:
    try:
        return load_processor(export.processor_folder, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None  # what needs one says so


def _run(
    compiled: Compiled,
    hooks: Hooks,
    requests: Iterable[Request],
    folder: Path,
    processor: Any,
) -> None:
    """Run the requests in float32 and dump each; the folder is there whole or not at all."""
    outputs = [spec.name for part in compiled.export.parts for spec in part.outputs]
    settings: dict[str, Any] = {}
    if any(name.startswith("present.") for name in outputs):
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    with staged_folder(folder, _DONE) as staging:
        count = 0
        for count, request in enumerate(requests, 1):
            run_compiled(
                compiled,
                hooks,
                request,
                processor=processor,
                settings=settings,
                write_io=True,
                io_folder=staging / f"{count:04d}",
            )
        (staging / _DONE).write_text(json.dumps({"requests": count}) + "\n", encoding="utf-8")


def _digest_of(request: Request) -> bytes:
    digest = hashlib.sha256(json.dumps([str(text) for text in request.prompts]).encode())
    for name, value in sorted({**(request.inputs or {}), **request.options}.items()):
        digest.update(name.encode() + _content_of(value))
    for value in (*request.audio, *request.images):
        digest.update(_content_of(value))
    return digest.digest()


def _content_of(value: Any) -> bytes:
    """The bytes of a file, an array, or what becomes one."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        return Path(value).read_bytes() if Path(value).is_file() else str(value).encode()
    array = np.asarray(value)
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()
