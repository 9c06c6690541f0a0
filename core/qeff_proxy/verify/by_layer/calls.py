"""The calls of a part in a run: found by running the flow on stand-ins that compute nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.flows.generation.inputs import checked_ids
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.load.load_model import load_config
from qeff_proxy.run.replay_tokens import replay_tokens
from qeff_proxy.session.axes import size_of
from qeff_proxy.session.session import Session
from qeff_proxy.tensor_names import PAST, PRESENT, TAP, is_state
from qeff_proxy.verify.by_layer.results import layer_name
from qeff_proxy.verify.options import VerifyOptions

if TYPE_CHECKING:
    from qeff_proxy.parts import TensorSpec

#: The outputs of one part: for each call, name → array.
Outputs = Sequence[Mapping[str, Array]]


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
    sessions = {one.name: _StandIn(one, known.get(one.name, ())) for one in job.export.parts}
    load_flow(job.export.flow).run(replace(job, sessions=sessions, recorder=recorder))
    return recorder.calls


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
