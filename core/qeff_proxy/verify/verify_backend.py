"""One backend of a verification: compile for it, run it, and compare it with the reference.

`backends_to_choose_from` tells which backends' speed can be measured on this machine.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.backends.registry import list_backends, load_backend
from qeff_proxy.compare import Comparison, Tolerances, compare_dumps, write_report
from qeff_proxy.compare.report import write_page
from qeff_proxy.compare.tolerances import COMPUTED_IN
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import ProxyError, UsageError
from qeff_proxy.verify.results import BackendResult, count_equal_tokens, score_steps
from qeff_proxy.verify.run_facts import error_page, facts_of_run
from qeff_proxy.verify.runs import REFERENCE

if TYPE_CHECKING:
    from qeff_proxy.verify.options import VerifyOptions
    from qeff_proxy.verify.runs import Runs


_LOG = logging.getLogger(__name__)


def try_backend(
    run: Runs, name: str, progress: Callable[[str], None], *, several: bool
) -> BackendResult:
    """Verify one backend; an exception becomes its result's failure.

    Args:
        run: The input, which the reference has run already.
        name: Of the backend.
        progress: Called with the name of each stage as it starts.
        several: Whether there are other backends, so that the report's file needs the name.
    """
    start = time.perf_counter()
    result = None
    report = report_path(run.options.html, name, several=several)
    try:
        progress(f"compiling for {name}")
        compiled = compiled_for(run, run.export, name, progress)
        progress(f"running {name}")
        result = run.candidate(compiled)
        progress(f"comparing {name}")
        comparison = compare_with_reference(run, compiled, name)
        reference, candidate = read_dump(run.folder / REFERENCE), read_dump(run.folder / name)
        equal, tokens = count_equal_tokens(reference, candidate, generates=run.generates)
        is_lower = load_backend(name).precision(compiled.options) is not None
        scores = score_steps(reference, candidate) if is_lower else {}
    except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
        _LOG.debug("%s failed", name, exc_info=error)
        _drop_locals(error)
        if report is not None:
            write_page(error_page(run, name, result, error), report)
        seconds = time.perf_counter() - start
        return BackendResult(name, error, result, None, 0, 0, seconds, report)
    seconds = time.perf_counter() - start
    done = BackendResult(name, None, result, comparison, equal, tokens, seconds, report, scores)
    if report is not None:
        facts = facts_of_run(run, name, result)
        scored = {"in what it says": done.scored} if done.scored else {}
        write_report(comparison, report, {**facts, **scored})
    return done


def compiled_for(run: Runs, export: Export, name: str, progress: Callable[[str], None]) -> Compiled:
    """Compile an export for a backend, calibrated where the backend needs that."""
    from qeff_proxy.run.calibration import takes_calibration, with_calibration

    chosen = run.options.compile_for(name)
    if takes_calibration(name):
        chosen = with_calibration(
            export,
            run.hooks,
            name,
            chosen,
            run.options.calibration,
            processor=run.processor,
            progress=progress,
        )
    force, wait = run.options.force, run.options.wait
    return compile_export(
        export, name, chosen, force=force, check=True, wait=wait, progress=progress
    )


def compare_with_reference(
    run: Runs, compiled: Compiled, dump: str, *, partial: bool = False
) -> Comparison:
    """Compare a backend's dump with the reference's, as precisely as the backend computes.

    Args:
        run: The runs of both.
        compiled: For the backend.
        dump: The folder of its dump, beside the reference's.
        partial: Compare only tensors in both dumps, and ignore tolerances of any others.
    """
    precision = load_backend(compiled.backend).precision(compiled.options)
    floors = run.floors.get(precision or "", {})
    missing = isinstance(floors, str)
    tolerances = replace(
        run.options.tolerances or Tolerances(),
        precision=precision,
        floors={} if isinstance(floors, str) else floors,
    )
    reference, candidate = read_dump(run.folder / REFERENCE), read_dump(run.folder / dump)
    if partial:
        tolerances = tolerances.among(candidate.names())
    comparison = compare_dumps(reference, candidate, tolerances=tolerances, partial=partial)
    if not missing:
        return comparison
    note = f"the limits are fixed, not relative to a noise floor: {floors}"
    return replace(comparison, notes=[*comparison.notes, note])


def precisions_of(run: Runs, names: Iterable[str]) -> list[str]:
    """The lower precisions in which backends compute a float32 model."""
    found: list[str | None] = []
    for name in names if run.export.dtype == "float32" else ():
        try:
            found.append(load_backend(name).precision(run.options.compile_for(name)))
        except ProxyError:
            continue  # its row will say so
    return [precision for precision in dict.fromkeys(found) if precision in COMPUTED_IN]


def needs_fixed_shapes(options: VerifyOptions, name: str) -> bool:
    """Whether a backend needs fixed shapes; False where it cannot be used, which its row says."""
    try:
        return load_backend(name).needs_fixed_shapes(options.compile_for(name))
    except ProxyError:
        return False


def check_uncalibrated(options: VerifyOptions, name: str) -> None:
    """Refuse a precision that a backend calibrates, where layers run alone.

    A dump to calibrate on holds the inputs of parts, not of layers. A backend that cannot be used
    passes: its row says so.
    """
    chosen = options.compile_for(name)
    try:
        calibrated = load_backend(name).is_calibrated(chosen)
    except ProxyError:
        return
    if calibrated:
        precision = load_backend(name).precision(chosen)
        raise UsageError(
            f"{name} in {precision} is calibrated on inputs of the whole model, and not layer by "
            "layer",
            "Choose another precision, or verify the model as a whole with --calibrate.",
        )


def backends_to_choose_from(
    options_of: Callable[[str], CompileOptions],
) -> tuple[list[str], dict[str, str]]:
    """The backends whose speed can be measured here, and why each of the others is left out.

    PyTorch is not among them: it is the reference.

    Args:
        options_of: The compile options of a backend, by its name.

    Returns:
        Names, and name → reason.
    """
    names: list[str] = []
    left_out: dict[str, str] = {}
    for report in list_backends():
        name = report.name
        if name == "torch" or not name:
            continue
        reason = report.reason if report.state != "listed" else None
        if reason is None:
            try:
                reason = why_untimed(name, options_of(name))
            except ProxyError as error:
                reason = error.problem
        if reason is None:
            names.append(name)
        else:
            left_out[name] = reason
    return names, left_out


def why_untimed(name: str, options: CompileOptions) -> str | None:
    """Why a backend's speed means nothing on this machine; ``None`` where it does mean something.

    Raises:
        BackendError: It cannot be used at all.
    """
    return load_backend(name).untimed(options)


def _drop_locals(error: BaseException | None) -> None:
    """Let go of the sessions and arrays in the frames of an error that a result keeps."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def report_path(html: Path | None, name: str, *, several: bool) -> Path | None:
    """The file of a backend's report, with its name before the suffix where there are several."""
    if html is None or not several:
        return html
    return html.with_name(f"{html.stem}.{name}{html.suffix or '.html'}")
