"""One backend of a verification: compiled, run, and held against the reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compare import Comparison, Tolerances, compare_dumps, write_report
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import ProxyError
from qeff_proxy.verify.results import BackendResult, count_equal_tokens
from qeff_proxy.verify.runs import REFERENCE

if TYPE_CHECKING:
    from qeff_proxy.artifact.export_folder import Export
    from qeff_proxy.verify.options import VerifyOptions
    from qeff_proxy.verify.runs import Runs

__all__ = ["compiled_for", "hold_against", "needs_fixed_shapes", "reason_of", "try_backend"]


def try_backend(
    run: Runs, name: str, progress: Callable[[str], None], *, several: bool
) -> BackendResult:
    """What one backend gave, or why it gave nothing.

    Args:
        run: The input, which the reference has run.
        name: Of the backend.
        progress: Told what happens as it begins.
        several: Whether its report needs its name, since there are others.
    """
    start = time.perf_counter()
    folder = None
    try:
        progress(f"compiling for {name}")
        compiled = compiled_for(run, run.export, name, progress)
        progress(f"running {name}")
        folder = run.candidate(compiled)
        progress(f"comparing {name}")
        comparison = hold_against(run, compiled, folder)
        reference, candidate = read_dump(run.folder / REFERENCE), read_dump(folder)
        equal, tokens = count_equal_tokens(reference, candidate, generates=run.generates)
        report = _report_path(run.options.html, name, several=several)
    except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
        seconds = time.perf_counter() - start
        return BackendResult(name, reason_of(error), folder, None, 0, 0, seconds, None)
    if report is not None:
        write_report(comparison, report)
    seconds = time.perf_counter() - start
    return BackendResult(name, None, folder, comparison, equal, tokens, seconds, report)


def compiled_for(run: Runs, export: Export, name: str, progress: Callable[[str], None]) -> Compiled:
    """An export compiled for a backend, calibrated where that is needed."""
    from qeff_proxy.run.calibration import takes_calibration, with_calibration

    chosen = run.options.compile_for(name)
    if takes_calibration(name):
        given, processor = run.options.calibration, run.processor
        chosen = with_calibration(
            export, run.hooks, name, chosen, given, processor=processor, progress=progress
        )
    return compile_export(export, name, chosen, force=run.options.force)


def hold_against(
    run: Runs, compiled: Compiled, folder: Path, *, partial: bool = False
) -> Comparison:
    """Compare a backend's dump with the reference's, as precisely as the backend computes.

    Args:
        run: What was run.
        compiled: For the backend.
        folder: The dump.
        partial: Compare what both have; a tolerance of something else counts for nothing.
    """
    precision = load_backend(compiled.backend).precision(compiled.options)
    tolerances = replace(run.options.tolerances or Tolerances(), precision=precision)
    reference, candidate = read_dump(run.folder / REFERENCE), read_dump(folder)
    if partial:
        tolerances = tolerances.among(candidate.names())
    return compare_dumps(reference, candidate, tolerances=tolerances, partial=partial)


def needs_fixed_shapes(options: VerifyOptions, name: str) -> bool:
    """Whether a backend needs fixed shapes; one that cannot be used says so in its own row."""
    try:
        return load_backend(name).needs_fixed_shapes(options.compile_for(name))
    except ProxyError:
        return False


def reason_of(error: Exception) -> str:
    """What went wrong, in a line: an error of ours says it, of others the kind is said, too."""
    if isinstance(error, ProxyError):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"


def _report_path(html: Path | None, name: str, *, several: bool) -> Path | None:
    if html is None or not several:
        return html
    return html.with_name(f"{html.stem}.{name}{html.suffix or '.html'}")
