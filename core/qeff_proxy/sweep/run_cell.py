"""Verify one cell in this process, and describe the result as a record of the ledger."""

from __future__ import annotations

import datetime
import math
import pkgutil
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from qeff_proxy.errors import ProxyError
from qeff_proxy.parts import PROXIES
from qeff_proxy.sweep.ledger import Divergence, Layer, Record, Verdict
from qeff_proxy.sweep.plan import Cell, changed_keys

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.compare import TensorComparison
    from qeff_proxy.load.load_model import LoadedModel
    from qeff_proxy.request import Request
    from qeff_proxy.verify.options import VerifyOptions
    from qeff_proxy.verify.results import BackendResult, Verification


#: A record, and the fingerprint of the run where there is one.
Outcome: TypeAlias = tuple[Record, dict[str, Any] | None]


class Job(msgspec.Struct, frozen=True):
    """A cell that is to run: plain data.

    Attributes:
        cell: What to verify.
        id: Its identity.
        night: The run of the sweep.
        versions: Of the packages that it depends on.
        folder: Of reports and of the dumps while it runs; absolute.
        work: The function that runs it, as ``module:function``.
        checked: Whether to compare the identity of the cell where it runs with ``id``.
    """

    cell: Cell
    id: str
    night: str
    versions: dict[str, str]
    folder: Path
    work: str = "qeff_proxy.sweep.run_cell:run_cell"
    checked: bool = False

    @property
    def dumps(self) -> Path:
        """Where its dumps lie while it runs."""
        return self.folder / "running" / self.id[:16]

    @property
    def report(self) -> Path:
        """Its page."""
        return self.folder / "reports" / self.night / f"{self.id[:16]}.html"

    def record(self, verdict: Verdict, reason: str = "", **more: Any) -> Record:
        """The record of the cell, with this end."""
        return Record(
            id=self.id,
            name=self.cell.name,
            night=self.night,
            time=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
            verdict=verdict,
            reason=reason,
            options=self.cell.options,
            setting=changed_keys(self.cell.setting),
            versions=self.versions,
            **more,
        )


def encode_job(job: Job) -> bytes:
    """A job as bytes, for another machine."""
    return msgspec.json.encode(job, enc_hook=str)


def decode_job(message: bytes) -> Job:
    """The job of `encode_job`."""
    return msgspec.json.decode(message, type=Job, dec_hook=lambda kind, value: kind(value))


def encode_outcome(outcome: Outcome) -> bytes:
    """What a cell gave, as bytes."""
    return msgspec.json.encode(outcome)


def decode_outcome(message: bytes) -> Outcome:
    """The outcome of `encode_outcome`."""
    return msgspec.json.decode(message, type=tuple[Record, dict[str, Any] | None])


def perform(job: Job) -> Outcome:
    """Run a job in this process, unless this machine is not as the one that made it."""
    different = _difference(job) if job.checked else None
    if different is not None:
        return job.record("wrong worker", different), None
    outcome: Outcome = pkgutil.resolve_name(job.work)(job)
    return outcome


def _difference(job: Job) -> str | None:
    """How this machine differs from the one that made a job, in what the cell depends on."""
    from qeff_proxy.sweep.identify_cells import identify_cells

    here = identify_cells([job.cell])[job.cell.name]
    if here.id == job.id:
        return None
    names = [
        n for n in {**job.versions, **here.versions} if job.versions.get(n) != here.versions.get(n)
    ]
    told = [f"{n} {here.versions.get(n, 'none')}, not {job.versions.get(n, 'none')}" for n in names]
    return f"{platform.node()} has {'; '.join(told) or 'other files or settings of this cell'}"


def run_cell(job: Job) -> Outcome:
    """Verify a cell.

    Returns:
        Its record, and the fingerprint of its run; whatever stops it is in the record.
    """
    from qeff_proxy.verify.results import reason_of

    stages = _Stages()
    shutil.rmtree(job.dumps, ignore_errors=True)  # of a run that was killed
    try:
        job.report.parent.mkdir(parents=True, exist_ok=True)
        return (_verify_layers if job.cell.setting.by_layer else _verify_whole)(job, stages)
    except Exception as error:  # noqa: BLE001 (a sweep goes on, whatever stops a cell)
        return _failure(job, error, reason_of(error), stages.end()), None
    finally:
        shutil.rmtree(job.dumps, ignore_errors=True)


def _verify_whole(job: Job, stages: _Stages) -> Outcome:
    from qeff_proxy.verify.results import reason_of
    from qeff_proxy.verify.verify_model import verify_model

    cell = job.cell
    verification = verify_model(
        _model_of(cell),
        [cell.backend],
        _request_of(cell),
        _options_of(job),
        trust_remote_code=cell.trust_remote_code,
        progress=stages.start,
    )
    result = verification.results[0]
    seconds = stages.end()
    if result.failure is not None:
        return _failure(job, result.failure, reason_of(result.failure), seconds), None
    return _described(job, result, verification, seconds)


def _verify_layers(job: Job, stages: _Stages) -> Outcome:
    """Verify one layer at a time; the ledger has the error that each adds."""
    from qeff_proxy.verify.by_layer import verify_layers
    from qeff_proxy.verify.by_layer.results import describe_layers

    cell = job.cell
    verification = verify_layers(
        _model_of(cell),
        [cell.backend],
        _request_of(cell),
        _options_of(job),
        trust_remote_code=cell.trust_remote_code,
        progress=stages.start,
    )
    if verification.failure is not None:
        raise verification.failure
    spent = stages.end()
    running = sum(spent[stage] for stage in spent if stage.endswith(f": {cell.backend}"))
    seconds = {f"running {cell.backend}": round(running, 3), "total": spent["total"]}
    result = verification.results[0]
    faulty = [*result.faulty, *(each for each in result.layers if not each.inherited.passed)]
    first = faulty[0] if faulty else None
    errors = [(each.local.over_peak, each.local.tensor) for each in result.layers]
    error, worst = max(errors, default=(None, None))
    verdict: Verdict = "refused" if result.error else "passed" if result.passed else "failed"
    where = None if first is None else first.local if first in result.faulty else first.inherited
    return job.record(
        verdict,
        result.error or ("" if result.passed else describe_layers(result, verification)[0]),
        divergence=None
        if first is None or where is None
        else Divergence(first.part, where.tensor, first.layer, where.step),
        error=_number(error),
        worst=worst,
        sqnr=_number(result.layers[-1].inherited.sqnr) if result.layers else None,
        layers=[
            Layer(each.name, _number(each.local.over_peak), _number(each.local.sqnr))
            for each in result.layers
        ],
        seconds=seconds,
        export=verification.export.name,
        report=_place(job),
    ), None


class _Stages:
    """The seconds of each stage."""

    def __init__(self) -> None:
        self._begin = self._start = time.perf_counter()
        self._stage = "loading"
        self._seconds: dict[str, float] = {}

    def start(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._start
        self._stage, self._start = stage, now

    def end(self) -> dict[str, float]:
        self.start("")
        stages = {stage: round(seconds, 3) for stage, seconds in self._seconds.items()}
        return {**stages, "total": round(self._start - self._begin, 3)}


def _failure(job: Job, error: Exception, reason: str, seconds: dict[str, float]) -> Record:
    report = {"report": _place(job)} if job.report.is_file() else {}
    verdict: Verdict = "refused" if isinstance(error, ProxyError) else "error"
    return job.record(verdict, reason[:2000], seconds=seconds, **report)


def _place(job: Job) -> str:
    return job.report.relative_to(job.folder.parent).as_posix()


def _model_of(cell: Cell) -> LoadedModel | Export:
    from qeff_proxy.artifact.export_folder import find_export
    from qeff_proxy.load.checkpoint_files import folder_named
    from qeff_proxy.load.load_model import load_model, with_options

    export = find_export(folder_named(cell.source))
    if export is not None:
        return export
    loaded = load_model(
        cell.source,
        task=cell.task,
        dtype=cell.setting.dtype,
        trust_remote_code=cell.trust_remote_code,
        allow_pickle=cell.allow_pickle,
    )
    return with_options(loaded, cell.cut_options)


def _request_of(cell: Cell) -> Request | None:
    import numpy as np

    from qeff_proxy.errors import UsageError
    from qeff_proxy.request import Request

    given = cell.input
    if given.ids:
        if len({len(row) for row in given.ids}) > 1:
            raise UsageError("the lists of token ids differ in length", "Make an input of each.")
        return Request(inputs={"input_ids": np.array(given.ids, np.int64)})
    if not (given.prompts or given.audio or given.images):
        return None
    return Request(given.prompts, audio=given.audio, images=given.images)


def _options_of(job: Job) -> VerifyOptions:
    from qeff_proxy.compare import Tolerances
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.verify.options import VerifyOptions

    setting = job.cell.setting
    return VerifyOptions(
        kind=PROXIES[setting.proxy],
        taps=setting.taps,
        opset=setting.opset,
        max_new_tokens=setting.max_new_tokens,
        piece=job.cell.piece,
        tolerances=Tolerances.parse(list(setting.tol)),
        compile=CompileOptions(
            batch_size=setting.batch_size,
            prefill_seq_len=setting.prefill_seq_len,
            ctx_len=setting.ctx_len,
            seq_len=setting.seq_len,
            num_cores=setting.num_cores,
        ),
        backends={job.cell.backend: job.cell.options},
        calibration=setting.calibrate,
        io_folder=job.dumps,
        html=job.report,
        speed=setting.speed,
    )


def _described(
    job: Job, result: BackendResult, verification: Verification, seconds: dict[str, float]
) -> Outcome:
    """The record and the fingerprint of a cell that ran to its end."""
    from qeff_proxy.compare.verdict import describe_verdict
    from qeff_proxy.sweep.fingerprint import find_dead_output, take_fingerprint

    assert result.comparison is not None  # noqa: S101 (it has no failure)
    assert result.folder is not None  # noqa: S101
    dead = find_dead_output(verification.reference)
    verdict: Verdict = "passed" if result.passed and dead is None else "failed"
    reason = "" if result.passed else describe_verdict(result.comparison)[0]
    if dead is not None:
        reason = (
            f"nothing was verified: {dead} of the reference is constant or not finite. {reason}"
        )
    first = result.divergence
    speed = verification.speed
    rates = [speed.rate(timing) for timing in speed.timings] if speed is not None else []
    provenance: Mapping[str, Any] = result.comparison.candidate_provenance
    record = job.record(
        verdict,
        reason.strip(),
        divergence=None
        if first is None
        else Divergence(first.tensor.partition(".")[0], first.tensor, first.layer, first.step),
        error=_number(result.worst_error),
        worst=str(result.worst.name) if result.worst is not None else None,
        sqnr=_number(result.sqnr),
        layers=_layers_of(result.comparison.tensors),
        equal_tokens=result.equal_tokens,
        tokens=result.tokens,
        seconds=seconds,
        speed=_number(rates[0]) if rates else None,
        precision=provenance.get("precision") or provenance.get("dtype"),
        export=verification.export.name,
        report=_place(job),
    )
    return record, take_fingerprint(result.folder)


def _layers_of(tensors: list[TensorComparison]) -> list[Layer]:
    """The worst error and SQNR of the outputs of each layer, in the order of the computation."""
    worst: dict[str, tuple[float, float]] = {}
    for tensor in sorted(tensors, key=lambda each: each.order):
        name = tensor.name
        if name.direction != "out" or name.layer is None:
            continue
        at = f"{name.part} layer {name.layer}"
        error, sqnr = worst.get(at, (0.0, math.inf))
        errors = [math.inf if math.isnan(e) else float(e) for e in tensor.step_error]
        decibels = [-math.inf if math.isnan(d) else float(d) for d in tensor.step_sqnr]
        worst[at] = max([error, *errors]), min([sqnr, *decibels])
    return [Layer(at, _number(error), _number(sqnr)) for at, (error, sqnr) in worst.items()]


def _number(value: float | None) -> float | None:
    """A JSON number of five digits; ``None`` where it is infinite or undefined."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
