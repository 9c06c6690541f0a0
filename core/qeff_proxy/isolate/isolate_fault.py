"""Isolate a fault: which operator of which layer makes a backend's numbers wrong.

1. The model is verified by layer (`qeff_proxy.verify.by_layer`), until a layer is out of line by
   its own error: on the reference's inputs.
2. That layer's operators run one by one on the CPU, which gives the exact value of everything in
   it (`Operators`), and is first compared with PyTorch.
3. Groups of operators run on the backend, all others exactly, until the smallest group is left that
   causes the error (`find_culprits`).
4. The proof: the model goes on to its last outputs twice, as the backend computes it and with the
   culprits exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.backends.registry import load_backend
from qeff_proxy.errors import ArtifactError, BackendError, UsageError
from qeff_proxy.isolate.blame import (
    MOST_CAUSES,
    RUNS,
    SAME,
    SEEN,
    Culprit,
    Trials,
    find_culprits,
    still,
)
from qeff_proxy.isolate.capsule import check_capsule_place
from qeff_proxy.isolate.check_backend import check_runs_anything
from qeff_proxy.isolate.describe import describe_operator, worst_element
from qeff_proxy.isolate.exact_layer import without
from qeff_proxy.isolate.layer_number import check_layer_number
from qeff_proxy.isolate.neighbourhood import Neighbour, neighbourhood
from qeff_proxy.isolate.operators import Operators, Values
from qeff_proxy.isolate.results import (
    Cause,
    Fault,
    WorstElement,
    describe_error,
    note_capsule,
)
from qeff_proxy.isolate.write_capsule import write_capsule
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer.candidate import Candidate
from qeff_proxy.verify.by_layer.results import (
    BackendLayers,
    LayerError,
    LayerResult,
    LayerVerification,
    compare_layer,
)
from qeff_proxy.verify.by_layer.verify_layers import LayerRun, verify_layers
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import opened

if TYPE_CHECKING:
    from torch import nn


#: Over the peak: what float32 rounding alone gives a layer, some 10 units of its last place.
_ROUNDING = 1e-6


def isolate_fault(
    model: str | Path | LoadedModel,
    backend: str = "onnxruntime",
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    layer: str | None = None,
    capsule: Path | None = None,
    anonymous: bool = False,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Fault:
    """Find the operators that make a backend's numbers wrong.

    Args:
        model: A checkpoint: folder, hub id, or loaded.
        backend: The backend's name.
        request: The input; by default the flow's example.
        options: As for `qeff_proxy.verify.by_layer.verify_layers`.
        layer: Look at this one (``"body layer 3"``, or ``"3"`` where only one part has layers),
            whether it is out of line or not; by default at the first that is.
        capsule: Write the first cause to this file (`qeff_proxy.isolate.capsule`).
        anonymous: Exchange the weights in it for random numbers.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts.

    Raises:
        UsageError: There is nothing to verify, no such layer, or the input cannot be right.
        UnsupportedModelError: The model cannot be run layer by layer.
        BackendError: The backend cannot be used, or fails in the layer.
    """
    if capsule is not None:
        check_capsule_place(capsule)
    load_backend(backend).check_options(backend, (options or VerifyOptions()).compile_for(backend))
    found = opened(model, trust_remote_code)
    if isinstance(found, LoadedModel):
        model = found
        if layer is not None:
            check_layer_number(layer, model)
    wanted = _Capsule(capsule, anonymous, str(getattr(model, "source", model)))
    search = _Search(layer, None, wanted, progress)

    def verify(search: _Search) -> LayerVerification:
        done = verify_layers(
            model,
            [backend],
            request,
            options,
            hooks=hooks,
            trust_remote_code=trust_remote_code,
            progress=progress,
            observe=search,
            listed=search.check,
        )
        if done.interrupted and search.fault is None:
            raise done.failure or KeyboardInterrupt  # the other layers are not known
        return done

    done = verify(search)
    if search.fault is None and layer is None and done.results[0].faulty:
        # Only beside the layers like it is it out of line, which is known at the end.
        judged = done.results[0].faulty[0]
        search = _Search(judged.name, judged.local, wanted, progress)
        done = verify(search)
    result = done.results[0]
    if search.fault is None:
        if layer is not None:
            raise BackendError(f"{backend} did not get as far as {layer}: {result.error}")
        fault = _nothing(result)
    else:
        fault = search.fault
    fault = note_capsule(replace(fault, source=done.source, backend=backend), capsule)
    if done.interrupted:
        said = f"Interrupted at {done.interrupted}, so there is no proof."
        fault = replace(fault, notes=(*fault.notes, said))
        return replace(fault, interrupted=done.failure is None)
    others = [one.name for one in result.faulty if fault.found and one.name != fault.where]
    if others:
        said = f"Out of line by their own error, too: {', '.join(others)} (see --layer)."
        fault = replace(fault, notes=(*fault.notes, said))
    if search.exact is None or search.exact.last is None:
        return fault
    before, after = result.layers[-1].inherited, search.exact.last.inherited
    return replace(fault, before=before, after=after)


def _nothing(result: BackendLayers) -> Fault:
    """No layer is out of line by its own error."""
    late = next((layer for layer in result.layers if not layer.inherited.passed), None)
    if late is None:
        worst = result.worst
        said = f"The largest error of its own: {worst.name}, {describe_error(worst.local)}."
        return Fault("", "", local=worst.local, notes=(said,))
    return Fault(
        "",
        "",
        part=late.part,
        layer=late.layer,
        step=late.inherited.step,
        local=late.local,
        inherited=late.inherited,
        unexplained="Each layer is within tolerance alone, so no operator is to blame: the "
        "backend's precision is too low for this model, or it is off everywhere alike.",
    )


class _Search:
    """Looks into the first layer that is out of line, or the named one, once it has run.

    Args:
        layer: The named one; ``None`` for the first that is out of line.
        judged: Its error beside those of the layers like it, where these are known.
        capsule: The capsule that is asked for.
        progress: Called with the name of each stage as it starts.
    """

    def __init__(
        self,
        layer: str | None,
        judged: LayerError | None,
        capsule: _Capsule,
        progress: Callable[[str], None],
    ) -> None:
        self._layer = layer
        self._judged = judged
        self._capsule = capsule
        self._progress = progress
        self.fault: Fault | None = None
        #: The backend with the culprits exact, which goes on beside it.
        self.exact: Candidate | None = None

    def __call__(
        self, layer: LayerRun, candidate: Candidate, before: Candidate
    ) -> Sequence[Candidate]:
        """See `qeff_proxy.verify.by_layer.verify_layers.Observer`."""
        result = candidate.last
        if self.fault is not None or result is None:
            return []
        if result.error is not None and candidate.failed_always:
            check_runs_anything(candidate, layer.reference.part, result.error)
        if not self._is_it(result):
            return []
        result = replace(result, local=self._judged or result.local)
        self.fault, culprits = _look_into(layer, candidate, result, self._capsule, self._progress)
        if not culprits or result.error is not None or result.local.passed:
            return []
        numbers = {number for culprit in culprits for number in culprit.numbers}
        self._progress(f"{result.name}: with the culprits exact")
        before.try_layer(
            layer.graph,
            layer.reference,
            layer.expected,
            layer.following,
            layer.floor,
            without(before, numbers),
        )
        if before.last is None or before.last.error is not None:
            return []
        self.exact = before
        return [before]

    def check(self, layers: Sequence[tuple[str, int | None]]) -> None:
        """Refuse a name that no layer has, before one runs."""
        if self._layer is not None and not any(self._named(*one) for one in layers):
            known = ", ".join(name for name, _ in layers)
            raise UsageError(f"there is no layer {self._layer!r}", f"There are: {known}.")

    def _is_it(self, result: LayerResult) -> bool:
        if self._layer is None:
            return not result.local.passed
        return self._named(result.name, result.layer)

    def _named(self, name: str, number: int | None) -> bool:
        return self._layer in ({name} if number is None else {name, str(number)})


def _look_into(
    layer: LayerRun,
    candidate: Candidate,
    result: LayerResult,
    capsule: _Capsule,
    progress: Callable[[str], None],
) -> tuple[Fault, list[Culprit]]:
    """Find the culprits in one layer."""
    part, graph = layer.reference.part, layer.graph
    steps = [call.step for call in layer.reference.calls]
    step = result.local.step or steps[0]
    number = steps.index(step)
    progress(f"{result.name}: running its operators one by one")
    operators = Operators(graph, layer.reference.feeds(graph, number, layer.expected))
    fault = Fault(
        "",
        candidate.name,
        part.name,
        graph.layer,
        step,
        len(operators.nodes),
        result.local,
        refused=result.error,
    )

    def compared(outputs: Values) -> LayerError:
        expected = {step: layer.expected[number]}
        return compare_layer(expected, {step: outputs}, part.name, candidate.tolerances)

    exact = compared(operators.results(operators.values))
    if not exact.passed:
        return replace(
            fault,
            unexplained="The exported graph itself differs from PyTorch here, before any backend "
            f"runs it ({exact.tensor}: {exact.over_peak:.3g} of the peak). Export it again with "
            "--force.",
        ), []

    trials = Trials(operators, lambda group: candidate.session(part, group.graph))
    whole, culprits = find_culprits(
        trials,
        # What is left of a lower precision's rounding is no cause of its own.
        lambda outputs: candidate.precision is not None or compared(outputs).passed,
        lambda stage: progress(f"{result.name}: {stage}"),
        most=1 if result.local.passed else MOST_CAUSES,
        seen=0.0 if result.local.passed else result.local.over_peak,
    )
    if result.local.passed:  # rounding is all operators' together: none has a share to speak of
        culprits = [
            one
            for one in culprits
            if one.error > _ROUNDING and not still(one.remaining, one.error, SAME)
        ]
    fault = replace(fault, whole=whole)
    if capsule.path is not None and culprits and whole is not None and not result.local.passed:
        fault = _with_capsule(fault, capsule, trials, culprits[0], candidate, progress)
    causes = tuple(
        _cause(culprit, trials, candidate.precision, layer.module) for culprit in culprits
    )
    operators.free_pages()
    return replace(fault, causes=causes, unexplained=_unexplained(result, whole, causes)), culprits


@dataclass(frozen=True)
class _Capsule:
    """The capsule that is asked for."""

    path: Path | None
    anonymous: bool
    source: str


def _with_capsule(
    fault: Fault,
    capsule: _Capsule,
    trials: Trials,
    culprit: Culprit,
    candidate: Candidate,
    progress: Callable[[str], None],
) -> Fault:
    """The fault with its capsule written, or with a note of why there is none."""
    assert capsule.path is not None  # noqa: S101 (see the caller)
    facts = {
        "source": capsule.source,
        "where": fault.where,
        "step": fault.step,
        "backend": candidate.name,
        "precision": candidate.precision,
        "versions": candidate.versions(),
    }
    try:
        said = write_capsule(
            capsule.path,
            trials,
            culprit.numbers,
            facts,
            anonymous=capsule.anonymous,
            progress=progress,
        )
    except (UsageError, ArtifactError) as error:
        return replace(fault, notes=(f"No capsule was written: {error}",))
    notes = (f"The capsule is smaller than the run: {said}.",) if said else ()
    return replace(fault, capsule=capsule.path, notes=notes)


def _unexplained(result: LayerResult, whole: float | None, causes: Sequence[Cause]) -> str:
    if whole is None:
        return "" if causes else "The backend refuses no group of its operators at fixed shapes."
    if result.error is not None:
        return (
            f"At the fixed shapes of this step the backend takes the layer ({whole:.3g} of the "
            "peak): what it refuses are shapes that are not fixed."
        )
    if result.local.passed:
        return "" if causes else "No operator stands out in its error."
    if whole < SEEN * result.local.over_peak:
        return (
            f"The layer's error does not show again at the fixed shapes of this step ({whole:.3g} "
            f"of the peak in any of {RUNS} runs, {result.local.over_peak:.3g} before): it comes "
            "from run to run, or from shapes that are not fixed."
        )
    if not causes:
        return "No group of its operators causes it."
    return ""


def _cause(
    culprit: Culprit, trials: Trials, precision: str | None, module: nn.Module | None
) -> Cause:
    operators = trials.operators
    facts = tuple(
        describe_operator(operators, number, precision, module) for number in culprit.numbers
    )
    worst: WorstElement | None = None
    around: tuple[Neighbour, ...] = ()
    if math.isfinite(culprit.error) or culprit.refused is None:
        actual = trials.run(culprit.numbers, operators.values)
        worst = worst_element(operators, actual)
        around = neighbourhood(operators, culprit.numbers, actual)
    return Cause(
        facts,
        culprit.error,
        culprit.remaining,
        culprit.shown,
        worst,
        culprit.refused,
        around,
    )
