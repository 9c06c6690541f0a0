"""The result of a verification, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.common.messages import counted
from qeff_proxy.common.shown import Shown
from qeff_proxy.compare import Comparison, Divergence, TensorComparison
from qeff_proxy.compare.tally import Tally
from qeff_proxy.dump import Dump
from qeff_proxy.errors import ProxyError
from qeff_proxy.run.run_compiled import RunResult

if TYPE_CHECKING:
    from qeff_proxy.verify.timing import Speed


#: Packages whose versions shape an export, as its ``made_by`` has them.
_PACKAGES = ("qeff-proxy", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
#: The outputs that say what a model does: an embedder's, and a language model's.
_VECTORS = "sentence_embedding"
_SCORED = ("logits", _VECTORS)


@dataclass(frozen=True, repr=False)
class BackendResult(Shown):
    """One backend's run, compared with the reference.

    Attributes:
        backend: Its name.
        failure: What stopped it before the comparison; ``None`` where nothing did.
        run: Its outputs and its dump; ``None`` where it failed before these.
        comparison: Of its dump with the reference's.
        equal_tokens: Of `tokens`, those whose most likely token is the reference's.
        tokens: Steps (times prompts) that decide a token; positions where a model gives the
            logits of all of them at once; 0 where it gives none.
        seconds: How long compiling, running and comparing took.
        report: The HTML report, where one was asked for.
        scores: Of a lower precision than the tensors', over all positions with logits: ``kl``, the
            mean divergence from PyTorch in nats, ``top1``, the share with the same first token, and
            how many ``positions``. Of an embedder ``cosine``, the mean of its vectors' with
            PyTorch's, ``least``, and how many ``vectors``. Nothing where there are neither.
    """

    backend: str
    failure: Exception | None
    run: RunResult | None
    comparison: Comparison | None
    equal_tokens: int
    tokens: int
    seconds: float
    report: Path | None
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> str:
        """What a lower precision makes of tokens or vectors; empty where nothing was scored."""
        if not self.scores:
            return ""
        if "vectors" in self.scores:
            vectors = counted(int(self.scores["vectors"]), "vector")
            least = f" (the least {self.scores['least']:.4f})" if self.scores["vectors"] > 1 else ""
            return f"the cosine with PyTorch's of {vectors} is {self.scores['cosine']:.4f}{least}"
        positions = int(self.scores["positions"])
        return (
            f"the logits' distributions are off by KL {self.scores['kl']:.1e} on average, and the "
            f"first choice is PyTorch's at {self.scores['top1']:.1%} of "
            f"{counted(positions, 'position')}"
        )

    @property
    def error(self) -> str | None:
        """The failure in one line; ``None`` where there is none."""
        return reason_of(self.failure) if self.failure is not None else None

    @property
    def folder(self) -> Path | None:
        """Its dump."""
        return self.run.io_folder if self.run is not None else None

    @property
    def passed(self) -> bool:
        """Whether every tensor of every step is within its tolerance."""
        return self.comparison is not None and self.comparison.passed

    @property
    def divergence(self) -> Divergence | None:
        """Where the backend first diverges from the reference."""
        return self.comparison.first_divergence if self.comparison is not None else None

    @property
    def worst(self) -> TensorComparison | None:
        """The tensor with the largest error over its reference's peak."""
        tensors = self.comparison.tensors if self.comparison is not None else []
        return max(tensors, key=_error, default=None)

    @property
    def worst_error(self) -> float:
        """The error of `worst`, over its reference's peak; 0.0 where there is none."""
        return _error(self.worst) if self.worst is not None else 0.0

    @property
    def final(self) -> list[TensorComparison]:
        """The model's output: the logits, else the last output outside of the layers."""
        tensors = self.comparison.tensors if self.comparison is not None else []
        outputs = [t for t in tensors if t.name.direction == "out" and t.name.layer is None]
        logits = [t for t in outputs if t.name.tensor == "logits"]
        return logits or [t for t in outputs if t.name == outputs[-1].name]

    @property
    def sqnr(self) -> float | None:
        """SQNR of the model's output in dB, of the worse phase; infinite where it is exact."""
        return min((t.worst.sqnr for t in self.final if t.worst is not None), default=None)

    @property
    def floor(self) -> float | None:
        """SQNR of PyTorch in the backend's precision, of the same output; ``None`` if unknown."""
        return min((t.floor.sqnr for t in self.final if t.floor is not None), default=None)

    @property
    def limit(self) -> float | None:
        """The least SQNR that the output may have; ``None`` where it is not limited."""
        return min((t.tolerance.sqnr for t in self.final if t.tolerance.sqnr), default=None)

    @property
    def cosine(self) -> float | None:
        """Cosine similarity of the model's output, of the worse phase."""
        return min((t.worst.cosine for t in self.final if t.worst is not None), default=None)

    @property
    def _provenance(self) -> Mapping[str, Any]:
        """What made its dump; empty where it has none."""
        return {} if self.comparison is None else self.comparison.candidate_provenance

    @property
    def made_by(self) -> dict[str, str]:
        """Versions of what made the export: package → version."""
        made = self._provenance.get("made_by") or {}
        return {name: made[name] for name in _PACKAGES if name in made}

    def verdict(self) -> str:
        """The verdict in a line."""
        if self.comparison is None:
            return f"ERROR: {self.error}"
        first = self.divergence
        where = "" if first is None else f", first divergence {first.tensor} in {first.step}"
        sqnr = "" if self.sqnr is None else f", SQNR {self.sqnr:.1f} dB"
        tokens = f", {self.equal_tokens} of {self.tokens} tokens equal" if self.tokens else ""
        return f"{'PASSED' if self.passed else 'FAILED'}{where}{sqnr}{tokens}"

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        return {"backend": self.backend, "verdict": self.verdict(), "report": self.report}

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; numbers that are infinite or undefined are None."""
        worst = self.worst
        origin = self.comparison.origin if self.comparison is not None else None
        return {
            "backend": self.backend,
            "versions": self._provenance.get("versions"),
            "passed": self.passed,
            "error": self.error,
            "dump": str(self.folder) if self.folder is not None else None,
            "report": str(self.report) if self.report is not None else None,
            "seconds": round(self.seconds, 3),
            "equal_tokens": self.equal_tokens,
            "tokens": self.tokens,
            "sqnr": _plain(self.sqnr),
            "exact": self.sqnr == math.inf,
            "floor_sqnr": _plain(self.floor),
            "limit_sqnr": self.limit,
            "cosine": _plain(self.cosine),
            "worst": None
            if worst is None
            else {
                "tensor": str(worst.name),
                "phase": worst.phase,
                "error_over_peak": _plain(self.worst_error),
            },
            "first_divergence": self.divergence.to_json() if self.divergence else None,
            "first_difference": origin.to_json() if origin is not None else None,
            "scores": dict(self.scores),
            "problems": self.comparison.problems if self.comparison is not None else [],
        }


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """A model on several backends, compared with PyTorch.

    Attributes:
        source: The checkpoint, as the user named it.
        export: The export's folder.
        taps: The layer outputs in the export.
        reference: The reference's dump.
        weights: Whose weights the reference ran: ``"checkpoint"`` or ``"export"``.
        input: The input, as JSON values.
        decoded: The reference's decoded output: texts, vectors …
        results: One per backend.
        speed: The measured speeds, where they were asked for.
        idle: Parts that did not run on this input, so that none of their tensors were compared.
    """

    source: str
    export: Path
    taps: tuple[str, ...]
    reference: Path
    weights: str
    input: dict[str, Any]
    decoded: Any
    results: tuple[BackendResult, ...]
    speed: Speed | None = None
    idle: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every backend passed."""
        return bool(self.results) and all(result.passed for result in self.results)

    def facts(self) -> dict[str, Any]:
        """What is shown of it."""
        verdicts = {result.backend: result.verdict() for result in self.results}
        return {"model": self.source, **verdicts, "export": self.export}

    def to_json(self) -> dict[str, Any]:
        """The verification as a JSON object."""
        return {
            "passed": self.passed,
            "model": self.source,
            "export": str(self.export),
            "taps": list(self.taps),
            "reference": str(self.reference),
            "reference_weights": self.weights,
            "input": self.input,
            "made_by": next((r.made_by for r in self.results if r.made_by), None),
            "idle_parts": list(self.idle),
            "decoded": self.decoded if _is_plain(self.decoded) else None,
            "backends": [result.to_json() for result in self.results],
            **({} if self.speed is None else {"speed": self.speed.to_json()}),
        }


def reason_of(error: Exception) -> str:
    """An error in one line: its message, preceded by its type unless it is a `ProxyError`."""
    if isinstance(error, ProxyError):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold ``value``."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float)


def _error(tensor: TensorComparison) -> float:
    errors = [float(error) for error in tensor.step_error]
    # An undefined error is worse than any number.
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def count_equal_tokens(reference: Dump, candidate: Dump, *, generates: bool) -> tuple[int, int]:
    """In how many of how many places two runs choose the same token.

    Args:
        reference: The dump of one run.
        candidate: The dump of the other, with the same steps.
        generates: Whether only the last position of a step decides a token, and of a prefill's
            chunks only the last; else each position of each step does.
    """
    equal = count = 0
    steps = list(reference.steps)
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if generates and step.phase == "prefill" and after is not None and after.phase == "prefill":
            continue
        for phase, name in reference.tensors:
            if phase != step.phase or (name.direction, name.tensor) != ("out", "logits"):
                continue
            logits = (d.array(phase, step.index, str(name)) for d in (reference, candidate))
            ours, theirs = (
                (array[..., -1:, :] if generates else array).astype(np.float32).argmax(-1)
                for array in logits
            )
            equal += int((ours == theirs).sum()) if ours.shape == theirs.shape else 0
            count += ours.size
    return equal, count


def score_steps(reference: Dump, candidate: Dump) -> dict[str, float]:
    """What a run makes of the reference's next tokens, or vectors, over all steps.

    Returns:
        See `BackendResult.scores`; nothing where there are none, or some are not finite.
    """
    tally = Tally(keep=0)
    cosines: list[float] = []
    for step in reference.steps:
        for phase, name in reference.tensors:
            if phase != step.phase or name.direction != "out" or name.tensor not in _SCORED:
                continue
            ours, theirs = (
                d.array(phase, step.index, str(name)).astype(np.float32)
                for d in (reference, candidate)
            )
            rows = ours.reshape(-1, ours.shape[-1])
            if ours.shape != theirs.shape or not np.isfinite(theirs).all():
                return {}
            if name.tensor == _VECTORS:
                one, other = rows.astype(np.float64), theirs.reshape(rows.shape).astype(np.float64)
                lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
                with np.errstate(invalid="ignore"):  # a vector of zeros has no direction
                    cosines += (np.sum(one * other, axis=1) / lengths).tolist()
                continue
            tokens = np.concatenate([[0], rows.argmax(1)])
            tally.add(rows, theirs.reshape(rows.shape), tokens, 1)
    if cosines and np.isfinite(cosines).all():
        return {
            "cosine": float(np.mean(cosines)),
            "least": min(cosines),
            "vectors": float(len(cosines)),
        }
    if not tally.windows:
        return {}
    measures = tally.measures()
    positions = sum(window[0] for window in tally.windows)
    return {"kl": measures["kl"], "top1": measures["top1"], "positions": float(positions)}
