"""What the report of a backend tells of its run, and the page of a backend that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compare.report import fill_page
from qeff_proxy.compare.report_facts import (
    described_input,
    described_options,
    described_texts,
    described_versions,
    today,
)
from qeff_proxy.compare.verdict import model_named
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.verify.results import reason_of

if TYPE_CHECKING:
    from qeff_proxy.run.run_compiled import RunResult
    from qeff_proxy.verify.runs import Runs


def facts_of_run(run: Runs, name: str, result: RunResult | None) -> dict[str, str]:
    """Input, output, precision, options and versions of a backend's run.

    Args:
        run: PyTorch's run and the backend's.
        name: Of the backend.
        result: Of its run; ``None`` where it failed before its end.
    """
    said = described_texts(run.decoded)
    facts = {"PyTorch says": said}
    if result is not None and described_texts(result.decoded) != said:
        facts[f"{name} says"] = described_texts(result.decoded)
    if result is not None and (own := run.own_choice()) is not None:
        facts[f"{name} would say"] = f"{described_texts(own)}, each token after PyTorch's"
    return facts_of_backend(run.export, name, run.options.compile_for(name), run.described(), facts)


def facts_of_backend(
    export: Export,
    name: str,
    options: CompileOptions,
    inputs: Mapping[str, Any],
    output: Mapping[str, str],
) -> dict[str, str]:
    """What is known of a backend, between an input and the date; without what is empty.

    Args:
        export: What it runs.
        name: Of the backend, which need not be installed.
        options: Of the backend.
        inputs: As JSON values.
        output: What is told of the output.
    """
    try:
        backend = load_backend(name)
        computed = backend.precision(options)
        precision = f"{computed}; exported in {export.dtype}" if computed else export.dtype
        versions = described_versions(export.made_by, backend.versions())
    except Exception:  # noqa: BLE001 (the verdict of the page tells that error, or a later one)
        precision = f"unknown; exported in {export.dtype}"
        versions = f"{described_versions(export.made_by, {})}; of {name} unknown"
    facts = {
        "input": described_input(inputs),
        **output,
        "backend": name,
        "options": described_options(options.to_json()),
        "precision": precision,
        "versions": versions,
        "date": today(),
    }
    return {fact: text for fact, text in facts.items() if text}


def error_page(run: Runs, name: str, result: RunResult | None, error: Exception) -> str:
    """The page of a backend that failed before its results could be compared."""
    lines = f"ERROR: {reason_of(error)}".splitlines()
    model = model_named({"model": run.export.model})
    facts = facts_of_run(run, name, result)
    return fill_page(f"Verification: {model}", f"{name} did not finish", lines, facts)
