"""Run a compiled export: preprocess, run the flow on the sessions, decode; optionally dump."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_proxy.artifact.export_folder import KEPT, enclosing_export
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import Compiled, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.atomic_folder import clear_leftovers
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.common.shown import Shown
from qeff_proxy.dump import DumpOptions, DumpWriter
from qeff_proxy.dump.place import DUMPS, write_error
from qeff_proxy.errors import DumpError
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.load.load_model import load_config
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.session.session import Session


@dataclass(frozen=True, repr=False)
class RunResult(Shown):
    """The result of a run.

    Attributes:
        outputs: The outputs of the flow, by name.
        decoded: Decoded by the ``decode`` hook; ``None`` without a processor.
        io_folder: The dump's folder; ``None`` without one.
    """

    outputs: Mapping[str, Any]
    decoded: Any
    io_folder: Path | None

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {"outputs": ", ".join(self.outputs), "dump": self.io_folder}


def generates(export: Export) -> bool:
    """Whether a model writes its output token by token."""
    outputs = (spec.name for part in export.parts for spec in part.outputs)
    return export.kind == "stub" or any(name.startswith("present.") for name in outputs)


def run_compiled(
    compiled: Compiled,
    hooks: Hooks,
    request: Request,
    *,
    processor: Any = None,
    settings: Mapping[str, Any] | None = None,
    write_io: bool = False,
    io_folder: Path | None = None,
    io_options: DumpOptions | None = None,
    sessions: Mapping[str, Session] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> RunResult:
    """Run a compiled proxy on one request.

    Args:
        compiled: What to run.
        hooks: Of its model type.
        request: The user's input.
        processor: The checkpoint's tokenizer or processor.
        settings: Of the flow: ``max_new_tokens``, ``num_beams``, ``streamer`` …
        write_io: Dump inputs and outputs of every run of every part.
        io_folder: The dump's folder; by default a new one below ``io/`` of the export.
        io_options: Which steps and tensors to keep.
        sessions: Run these, one per part, instead of what was compiled; they stay open.
        tensors: The result of the ``preprocess`` hook, if it ran before.

    Raises:
        UsageError: The request cannot be served.
        BackendError: A part fails.
        DumpError: The dump cannot be written. An earlier one in its place is kept.
    """
    export = compiled.export
    if tensors is None:
        with quiet_loading():  # tokenizers warn of texts that are then refused
            defaults = export.settings.get("request_options", {})
            tensors = hooks.preprocess(processor=processor, request=request.with_defaults(defaults))
    settings = dict(settings or {})
    folder = None
    if write_io:
        folder = _io_folder(export, io_folder)
    writer = None
    if folder is not None:
        writer = DumpWriter(folder, _provenance(compiled, request, settings), io_options)
    opened = open_sessions(compiled, hooks) if sessions is None else nullcontext(sessions)
    with writer or nullcontext(), opened as running:
        job = Job(
            export=export,
            sessions=running,
            options=compiled.options,
            config=load_config(export.processor_folder),
            tensors=tensors,
            folder=export.processor_folder,
            settings=settings,
            processor=processor,
            recorder=writer,
        )
        outputs = load_flow(export.flow).run(job)
    return RunResult(outputs, hooks.decode(processor=processor, outputs=outputs), folder)


def _io_folder(export: Export, asked_for: Path | None) -> Path:
    """Where a dump goes: as asked for, or to a new folder below ``io/`` of the export."""
    if asked_for is not None:
        check_io_folder(asked_for)
        return asked_for
    return new_io_folder(export)


def new_io_folder(export: Export, prefix: str = "") -> Path:
    """A new folder below ``io/`` of an export; what killed runs left there is cleared.

    Args:
        export: The export.
        prefix: Of its name; ``"verify-"`` for a folder of several dumps.

    Raises:
        DumpError: The system refuses.
    """
    now = datetime.datetime.now(datetime.UTC)  # names sort by time
    folder = export.folder / "io" / f"{prefix}{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    try:
        for parent in (folder.parent, *folder.parent.glob("verify-*")):
            clear_leftovers(DUMPS, parent)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def check_io_folder(folder: Path) -> None:
    """Refuse to dump into an export, except below its ``io/``, which is for dumps.

    Raises:
        DumpError: The folder is an export, or lies in one.
    """
    place = folder.resolve()
    export = enclosing_export(place)
    if export is None:
        return
    inside = place.relative_to(export).parts
    if len(inside) < 2 or inside[0] not in KEPT:
        raise DumpError(
            f"{folder} is a place in the export {export}, where no dump can be kept",
            f"Name a folder below {export / KEPT[0]}, or outside of the export.",
        )


def _provenance(
    compiled: Compiled, request: Request, settings: Mapping[str, Any]
) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    return {
        "model": compiled.export.model,
        "kind": compiled.export.kind,
        "dtype": compiled.export.dtype,
        "precision": load_backend(compiled.backend).precision(compiled.options),
        "made_by": compiled.export.made_by,
        "backend": compiled.backend,
        **({"adapter": name} if (name := compiled.export.adapter_name) else {}),
        "versions": dict(load_backend(compiled.backend).versions()),
        "options": compiled.options.to_json(),
        "prompts": [str(prompt) for prompt in request.prompts],
        "settings": {name: value for name, value in settings.items() if isinstance(value, plain)},
    }
