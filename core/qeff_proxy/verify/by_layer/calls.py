"""The calls of a part in a run: found by running the flow on stand-ins that compute nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.load.load_model import load_config
from qeff_proxy.request import Request
from qeff_proxy.run.replay_tokens import replay_tokens
from qeff_proxy.session.axes import size_of
from qeff_proxy.session.session import Session
from qeff_proxy.tensor_names import PAST, PRESENT, TAP, is_state
from qeff_proxy.verify.by_layer.results import layer_name
from qeff_proxy.verify.options import VerifyOptions

if TYPE_CHECKING:
    import torch

    from qeff_proxy.parts import TensorSpec

#: The outputs of one part: for each call, name → array.
Outputs = Sequence[Mapping[str, Array]]
#: Prompt and continuation of at most so many tokens fit into any model's context.
_FITS = 512
_EXAMPLE = 16


@dataclass
class Call:
    """One call of a part.

    Attributes:
        step: Its step: ``prefill-0000``.
        inputs: Its inputs, without the cache.
        past: The shapes of the cache's inputs, by name.
    """

    step: str
    inputs: Mapping[str, Array]
    past: Mapping[str, tuple[int, ...]]

    def cache(self, spec: TensorSpec, before: Mapping[str, Array] | None) -> Array:
        """The input of a cache: empty, a state of zeros, or an output of the call before.

        Raises:
            UnsupportedModelError: It is neither.
        """
        shape = self.past[spec.name]
        if 0 in shape or (before is None and is_state(spec.name)):
            return np.zeros(shape, numpy_dtype(spec.dtype))
        array = (before or {}).get(spec.name.replace(PAST, PRESENT, 1))
        if array is None or array.shape != shape:
            raise UnsupportedModelError(
                f"{spec.name} of {self.step} does not continue the cache of the step before",
                "Verify the whole model instead of its layers.",
            )
        return array


@dataclass
class _Recorder:
    """Keeps the calls of one part."""

    part: str
    calls: list[Call] = field(default_factory=list)

    def step(
        self,
        phase: str,
        index: int,
        part: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],  # noqa: ARG002 (part of the protocol)
        *,
        past_length: int,  # noqa: ARG002
    ) -> None:
        if part == self.part:
            past = {name: array.shape for name, array in inputs.items() if name.startswith(PAST)}
            others = {name: array.copy() for name, array in inputs.items() if name not in past}
            self.calls.append(Call(f"{phase}-{index:04d}", others, past))


class _StandIn(Session):
    """Returns outputs that are known already; zeros, without memory of their own, for others."""

    def __init__(self, part: Any, known: Outputs) -> None:
        super().__init__(part)
        self._known: Iterator[Mapping[str, Array]] = iter(known)

    def compute(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:  # noqa: ARG002
        known = next(self._known, {})
        return {
            spec.name: known[spec.name] if spec.name in known else self._zeros(spec, sizes)
            for spec in self.part.outputs
        }

    def _zeros(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        try:
            shape = tuple(size_of(axis, sizes) for axis in spec.shape)
        except KeyError as error:
            raise UnsupportedModelError(
                f"the size of {error.args[0]!r} of {spec.name} is known only when the {self.name} "
                "part has run",
                "Verify the whole model instead of its layers.",
            ) from error
        return zeros(shape, spec.dtype)


def zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros that take no memory; a writeable array, so that PyTorch shares it."""
    zero = np.zeros(1, numpy_dtype(dtype))
    return np.ndarray(shape, zero.dtype, zero, strides=(0,) * len(shape))


def calls_of(job: Job, part: str, known: Mapping[str, Outputs]) -> list[Call]:
    """Run a flow on stand-ins to learn how it calls a part.

    Args:
        job: The run; its settings must not depend on what the parts compute.
        part: The part's name.
        known: The outputs of the parts before it.
    """
    recorder = _Recorder(part)
    sessions = _stand_ins(job.export, known)
    load_flow(job.export.flow).run(replace(job, sessions=sessions, recorder=recorder))
    return recorder.calls


def calls_on_ids(
    export: Export, part: str, known: Mapping[str, Outputs], ids: Array, new: int
) -> list[Call]:
    """`calls_of` for a decoder on token ids, without PyTorch, which takes its time to import.

    Args:
        export: Its flow is ``causal-lm``.
        part: The part's name.
        known: The outputs of the parts before it.
        ids: The prompt, ``[batch, tokens]`` int64, without padding.
        new: Tokens to generate: the prompt's, again from their start.
    """
    recorder = _Recorder(part)
    engine = CausalEngine(export.parts, _stand_ins(export, known), adapter=export.adapter)
    length = ids.shape[1]
    chunk = engine.longest_step or length
    steps = [("prefill", index, start) for index, start in enumerate(range(0, length, chunk))]
    steps += [("decode", index, length + index) for index in range(new - 1)]
    every = np.take(ids, range(length + new), axis=1, mode="wrap")
    cache = None
    for phase, index, start in steps:
        stop = start + 1 if phase == "decode" else min(start + chunk, length)
        seen = np.ones_like(every[:, :stop])
        step = StepId(phase, index)  # type: ignore[arg-type]
        _, cache = engine.step(
            step, every[:, start:stop], seen, cache, last_only=True, recorder=recorder
        )
    return recorder.calls


def plain_ids(export: Export, request: Request | None, options: VerifyOptions) -> Array | None:
    """The prompt for `calls_on_ids`, random where there is no request; ``None`` if it needs more.

    What it does not take, such as tokens that the model lacks, is for the flow to refuse.
    """
    rows = export.settings.get("embedding_rows")
    shapes = options.compile.prefill_seq_len or options.compile.ctx_len or options.continuation
    more = shapes or export.settings.get("request_options")
    if export.flow != "causal-lm" or export.kind == "stub" or rows is None or more:
        return None
    if request is None:
        return np.random.default_rng(0).integers(0, rows, (1, _EXAMPLE))
    if list(request.inputs or ()) != ["input_ids"]:
        return None
    try:
        ids = np.asarray((request.inputs or {})["input_ids"])
    except ValueError:  # rows of other lengths
        return None
    fits = ids.ndim == 2 and ids.size > 0 and ids.shape[1] + options.max_new_tokens <= _FITS
    if not fits or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= rows:
        return None
    return ids.astype(np.int64)


def _stand_ins(export: Export, known: Mapping[str, Outputs]) -> dict[str, _StandIn]:
    return {one.name: _StandIn(one, known.get(one.name, ())) for one in export.parts}


def job_of(export: Export, options: VerifyOptions, tensors: Mapping[str, torch.Tensor]) -> Job:
    """A run whose tokens are known: the prompt's, again from their start, are the continuation."""
    tokens = continuation(export, options, tensors)
    return Job(
        export=export,
        sessions={},
        options=options.compile,
        config=load_config(export.processor_folder),
        tensors=tensors,
        folder=export.processor_folder,
        settings=replay_settings(tokens) if tokens else {},
    )


def continuation(
    export: Export, options: VerifyOptions, tensors: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The tokens to generate, ``[batch]`` each; none where the model does not generate."""
    if not any(spec.name.startswith(PRESENT) for part in export.parts for spec in part.outputs):
        return []
    import torch

    from qeff_proxy.flows.generation.inputs import checked_ids

    rows = export.settings.get("embedding_rows")
    ids = tensors.get("input_ids")
    if options.continuation:
        given = {"continuation": torch.tensor([list(options.continuation)])}
        tokens = checked_ids(given, rows, "continuation")
        return list(tokens.expand(1 if ids is None else len(ids), -1).T)
    if ids is None:  # the model does not start from tokens
        count = int(rows or 2)  # from the middle of the vocabulary: special tokens are at its ends
        ids = (torch.arange(options.max_new_tokens)[None] + count // 2) % count
    ids = torch.as_tensor(ids)
    return [ids[:, number % ids.shape[1]] for number in range(options.max_new_tokens)]


def replay_settings(tokens: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The settings of a flow that generates exactly these tokens, ``[batch]`` each."""
    return {
        "max_new_tokens": len(tokens),
        "do_sample": False,
        "num_beams": 1,
        "logits_processor": [replay_tokens(tokens)],
    }


def check_alone(part: ExportedPart, graph: LayerGraph, stage: int) -> None:
    """Refuse a layer that reads other layers' outputs than that of the one before it."""
    taps = {spec.name for spec in graph.inputs if spec.name.startswith(TAP)}
    others = sorted(taps - {f"{TAP}{stage - 1}"})
    if others:
        raise UnsupportedModelError(
            f"{layer_name(part.name, graph.layer)} also reads {others[0]}",
            "Verify the whole model instead of its layers.",
        )
