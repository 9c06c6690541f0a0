"""Verify without a reference: run one input in several arrangements, and compare each layer.

Whatever the arrangement, a token has the same values in every layer: alone or in a batch, behind
padding, in one chunk or token by token. A wrong mask, position or row of the cache shows as a
difference, and the first layer that has it is named. It serves for models that are too large for a
reference, and for backends of which nothing else is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.export_folder import check_weights_of
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import compile_export, fixed_lengths, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.common.notebook import in_notebooks
from qeff_proxy.compare.tolerances import COMPUTED_IN, NoiseFloor, Tolerances
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.request import Request
from qeff_proxy.session.session import Session
from qeff_proxy.verify.by_layer.calls import continuation, job_of, replay_settings
from qeff_proxy.verify.by_layer.results import (
    compare_layer,
    layer_name,
    measure_floor,
    output_names,
)
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.results import reason_of
from qeff_proxy.verify.rounding import BITS
from qeff_proxy.verify.runs import check_request, complete_request, processor_in
from qeff_proxy.verify.self_check.arrangements import (
    Arrangement,
    Outputs,
    arrangements,
    first_row,
)
from qeff_proxy.verify.self_check.results import Agreement, BackendAgreement, SelfVerification
from qeff_proxy.verify.verify_backend import needs_fixed_shapes
from qeff_proxy.verify.verify_model import (
    check_names,
    export_of,
    installed_hooks,
    live_proxy,
    opened,
)

_LOG = logging.getLogger(__name__)

_RUN = "run"  # the one step that the calls of a part are joined to


@in_notebooks("verifying")
def verify_self(
    model: str | Path | LoadedModel | Export,
    backends: Sequence[str] = ("onnxruntime",),
    request: Request | None = None,
    options: VerifyOptions | None = None,
    *,
    hooks: Hooks | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _stage: None,
) -> SelfVerification:
    """Run one input in several arrangements on each backend, and compare every layer's output.

    Args:
        model: A checkpoint (folder, hub id, or loaded), or an export with layer taps.
        backends: Their names.
        request: One input; by default the flow's example.
        options: Which export, compilation and tolerances; of the prompt, ``max_new_tokens`` tokens
            are the continuation, again from its start.
        hooks: Of its model type, in place of the installed plugins.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Called with the name of each stage as it starts; a notebook shows it by default.

    Raises:
        UsageError: There is nothing to verify, or the input cannot be right.
        BackendError: None of the backends can be used.
    """
    options = options or VerifyOptions()
    names = tuple(dict.fromkeys(backends))
    check_names(names, options)
    model = opened(model, trust_remote_code)
    hooks = hooks or installed_hooks(model)
    is_example = request is None
    request, tensors = check_request(request, model, hooks, trust_remote_code)
    export = export_of(model, hooks, options, progress)
    if options.tolerances is not None:
        options.tolerances.check_used(output_names(export))
    check_weights_of(export)
    processor = processor_in(export.processor_folder, trust_remote_code)
    loaded = model if isinstance(model, LoadedModel) else None
    live = cache(lambda: live_proxy(loaded, hooks, export))
    _, tensors = complete_request(export, request, tensors, hooks, processor, live)
    ways = arrangements(export, first_row(tensors) if is_example else tensors)
    results = []
    for name in names:
        progress(f"compiling for {name}")
        try:
            agreements = _agreements(export, name, ways, options, hooks, progress)
            results.append(BackendAgreement(name, agreements))
        except Exception as error:  # noqa: BLE001 (a backend's own fault must not stop the others)
            _LOG.debug("%s failed", name, exc_info=error)
            results.append(BackendAgreement(name, error=reason_of(error)))
    return SelfVerification(export.model["source"], export.folder, tuple(results))


def _agreements(
    export: Export,
    name: str,
    ways: Sequence[Arrangement],
    options: VerifyOptions,
    hooks: Hooks,
    progress: Callable[[str], None],
) -> tuple[Agreement, ...]:
    """Compare the other arrangements with the first on one backend."""
    compile_options = options.compile_for(name)
    if needs_fixed_shapes(options, name):  # of batch size 1, a batch would run row by row
        rows = max(2, compile_options.batch_size)
        compile_options = fixed_lengths(export, replace(compile_options, batch_size=rows))
    compiled = compile_export(
        export, name, compile_options, force=options.force, check=True, progress=progress
    )
    alone, *others = ways
    tokens = continuation(export, options, alone.tensors)
    base = job_of(export, options, alone.tensors)
    precision = load_backend(name).precision(compile_options)
    tolerances = replace(options.tolerances or Tolerances(), precision=precision)

    def run(way: Arrangement, sessions: Mapping[str, Session]) -> Outputs:
        progress(f"{name}: {way.name}")
        outputs = Outputs(export)
        job = replace(
            base,
            sessions=sessions,
            options=replace(compiled.options, **way.options),
            tensors=way.tensors,
            settings=replay_settings([one.expand(way.rows) for one in tokens]) if tokens else {},
            recorder=outputs,
        )
        load_flow(export.flow).run(job)
        return outputs

    agreements = []
    with open_sessions(compiled, hooks) as sessions:
        expected = run(alone, sessions)
        if precision in COMPUTED_IN and precision in BITS and "embedding" in sessions:
            noisy = {**sessions, "embedding": _Noisy(sessions["embedding"], BITS[precision])}
            noise = run(replace(alone, name="with noise"), noisy)
            tolerances = replace(tolerances, floors=_floors(expected, noise))
        for way in others:
            try:
                actual = run(way, sessions)
            except UsageError:  # it does not fit into the model's positions
                continue
            except Exception as error:  # noqa: BLE001 (the other arrangements may run)
                _LOG.debug("%s failed %s", name, way.name, exc_info=error)
                agreements.append(Agreement(way.name, failure=reason_of(error)))
                continue
            agreements.append(_compare(way.name, expected, actual, tolerances))
    return tuple(agreements)


def _compare(name: str, expected: Outputs, actual: Outputs, tolerances: Tolerances) -> Agreement:
    """Compare one arrangement, layer by layer, up to the first that is beyond its limits."""
    agreement = Agreement(name)
    pairs = zip(expected.layers(), actual.layers(like=expected), strict=True)
    for (part, layer, reference), (_, _, outputs) in pairs:
        error = compare_layer({_RUN: reference}, {_RUN: outputs}, part, tolerances)
        where = layer_name(part, layer)
        if not error.passed:
            return Agreement(name, where, where, error)
        if not agreement.worst or error.over_peak > agreement.error.over_peak:
            agreement = Agreement(name, None, where, error)
    return agreement


def _floors(expected: Outputs, noise: Outputs) -> dict[tuple[str, str], NoiseFloor]:
    """By phase and name, how far a rounding error of the embedding's outputs moves each tensor."""
    floors: dict[tuple[str, str], NoiseFloor] = {}
    for (part, _, one), (_, _, other) in zip(expected.layers(), noise.layers(), strict=True):
        floors |= measure_floor({_RUN: one}, {_RUN: other}, part)
    return floors


class _Noisy(Session):
    """A session whose outputs are off by a rounding error, up or down at random.

    Args:
        session: It stays open.
        bits: Significant bits of the precision.
    """

    def __init__(self, session: Session, bits: int) -> None:
        super().__init__(session.part)
        self._session = session
        self._error = 2.0**-bits

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        random = np.random.default_rng(0)
        return {
            name: (a * (1 + self._error * random.choice((-1, 1), a.shape))).astype(a.dtype)
            for name, a in self._session.run(feeds).items()
        }
