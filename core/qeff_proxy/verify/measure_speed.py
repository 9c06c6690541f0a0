"""Measure the speed of backends and of PyTorch's uncut model, on the same input in turns.

Every backend runs the graphs that users get, without the layer taps of the verification: an extra
output of each layer costs time and prevents fusions. These graphs are therefore compared with the
reference too, and only those that pass are measured. All generate the reference's tokens, so all do
the same amount of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import Compiled, open_sessions
from qeff_proxy.common.private_names import attention_of
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.common.threads import limit_threads
from qeff_proxy.flows.flow import Flow, Job, TimedFlow, load_flow
from qeff_proxy.load.load_model import load_config
from qeff_proxy.session.session import Session
from qeff_proxy.verify.results import BackendResult, reason_of
from qeff_proxy.verify.runs import Runs
from qeff_proxy.verify.timing import Speed, Timing, take_turns
from qeff_proxy.verify.verify_backend import compare_with_reference, compiled_for, why_untimed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What PyTorch's row is called.
PYTORCH = "PyTorch"
_PLAIN = "{}-plain"


def measure_speed(
    run: Runs,
    export: Export,
    model: Callable[[], PreTrainedModel],
    results: Sequence[BackendResult],
    left_out: Mapping[str, str],
    progress: Callable[[str], None],
) -> Speed:
    """Measure the backends that passed, and PyTorch.

    All stay loaded side by side while they are measured.

    Args:
        run: The input, which reference and backends have run already.
        export: The export to measure: the verified one, or the same without taps.
        model: Makes the uncut model.
        results: Of the verification.
        left_out: Backends that were not verified, and why.
        progress: Called with the name of each stage as it starts.
    """
    out = dict(left_out)
    with ExitStack() as stack:
        jobs: dict[str, Job] = {}
        for result in results:
            name = result.backend
            try:
                reason = _why_out(result, run)
                if reason is None:
                    progress(f"verifying {name} without taps")
                    compiled = compiled_for(run, export, name, progress)
                    reason = None if export is run.export else _plain_fault(run, compiled)
                if reason is None:
                    sessions = stack.enter_context(open_sessions(compiled, run.hooks))
                    jobs[name] = _job(run, compiled, sessions)
            except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
                reason = reason_of(error)
            if reason is not None:
                out[name] = reason
        if not jobs:
            return Speed(0.0, "runs", (), left_out=out)
        return _measured(run, jobs, model, out, progress)


def _measured(
    run: Runs,
    jobs: Mapping[str, Job],
    model: Callable[[], PreTrainedModel],
    out: dict[str, str],
    progress: Callable[[str], None],
) -> Speed:
    flow = load_flow(run.export.flow)
    contenders: dict[str, Callable[[], object]] = {
        name: partial(_run_parts, flow, run, job) for name, job in jobs.items()
    }
    first = next(iter(jobs.values()))
    amount, unit = _amount(run, first)
    notes: list[str] = []
    if first.export.settings.get("taps"):
        notes.append("these graphs have layer taps; name the checkpoint to measure without")
    with ExitStack() as stack, quiet_loading():
        try:
            uncut = model()
            attention = stack.enter_context(_own_attention(uncut))
            notes.append(f"{PYTORCH} runs transformers' {type(uncut).__name__}, {attention}")
            threads = run.options.compile.num_cores
            contenders[PYTORCH] = partial(_run_uncut, uncut, flow, run, first, threads)
        except Exception as error:  # noqa: BLE001 (a failure of PyTorch must not stop the backends)
            notes.append(f"{PYTORCH} is not measured: {reason_of(error)}")
        timings, failed = take_turns(contenders, run.options.turns, progress)
    if PYTORCH in failed:
        notes[-1] = f"{PYTORCH} is not measured: {reason_of(failed.pop(PYTORCH))}"
    out |= {name: reason_of(error) for name, error in failed.items()}
    reference = timings.pop(PYTORCH, None)
    return Speed(amount, unit, tuple(_sorted(timings)), reference, out, tuple(notes))


def _sorted(timings: Mapping[str, Timing]) -> list[Timing]:
    return sorted(timings.values(), key=lambda timing: timing.median)


def _why_out(result: BackendResult, run: Runs) -> str | None:
    """Why a verified backend is not measured; ``None`` where it is."""
    if not result.passed:
        return "it did not pass"
    options = run.options.compile_for(result.backend)
    return why_untimed(result.backend, options)


def _plain_fault(run: Runs, compiled: Compiled) -> str | None:
    """Why a backend does not pass without taps; ``None`` where it passes."""
    dump = _PLAIN.format(compiled.backend)
    run.candidate(compiled, dump)
    comparison = compare_with_reference(run, compiled, dump, partial=True)
    first = comparison.first_divergence
    return None if first is None else f"without taps it did not pass: {first.tensor}"


def _job(run: Runs, compiled: Compiled, sessions: Mapping[str, Session]) -> Job:
    export = compiled.export
    return Job(
        export=export,
        sessions=sessions,
        options=compiled.options,
        config=load_config(export.processor_folder),
        tensors=run.tensors,
        folder=export.processor_folder,
        processor=run.processor,
    )


def _again(run: Runs, job: Job) -> Job:
    """The job with fresh settings: each run uses up the tokens it is fed."""
    return replace(job, settings=run.settings())


def _amount(run: Runs, job: Job) -> tuple[float, str]:
    """The amount of work in one run, and its unit."""
    flow = load_flow(job.export.flow)
    if isinstance(flow, TimedFlow):
        return flow.amount(job)
    ids = flow.run(_again(run, job)).get("generated_ids")
    return (1.0, "runs") if ids is None else (float(ids.size), "tokens")


def _run_parts(flow: Flow, run: Runs, job: Job) -> object:
    return flow.run(_again(run, job))


def _run_uncut(
    model: PreTrainedModel, flow: Flow, run: Runs, job: Job, threads: int | None
) -> object:
    """Run the uncut model on the same tensors as the parts."""
    job = _again(run, job)
    with limit_threads(threads), torch.no_grad():
        if isinstance(flow, TimedFlow):
            return flow.run_model(model, job)
        tensors = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in job.tensors.items()
        }
        return model.generate(**tensors, **job.settings)


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[str]:
    """Switch a model to the attention that transformers uses by default; yields its name.

    Checkpoints are loaded with eager attention, which is slower than what their users run.
    """
    before = attention_of(model) or "eager"
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # how transformers says that it has none
        model.set_attn_implementation(before)
    try:
        yield f"{attention_of(model)} attention"
    finally:
        model.set_attn_implementation(before)
