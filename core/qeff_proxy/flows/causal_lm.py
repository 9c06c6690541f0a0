"""The ``causal-lm`` flow, and its verified cut: the parts together must equal the uncut model.

The logits of the parts are compared with those of the model on random token ids: with a left-padded
row, over a prefill, a second chunk and a decode step, with sliding windows shrunk so that they hide
something, and with rotary factors that change for the second chunk, where a model's change at all.
Parts that take one position at a time are compared with the model's prefill and decode steps.
Nothing is written before this passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.errors import CutError, UnsupportedModelError
from qeff_proxy.families.model_cache import cache_argument, cache_of, has_cache
from qeff_proxy.families.rotary import LONGROPE_LIMIT, rotary_limits
from qeff_proxy.flows.causal_engine import CausalEngine, StepId, position_ids_of
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.parts import MaskSpec, Part, Proxy
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site

_STEPS = (9, 3, 1)  # queries of the prefill, of a second chunk, of a decode step
_SINGLE_STEPS = (9, 1, 1, 1, 1)  # of a model whose parts take one position at a time
_PADDING = 4  # padded positions in front of the second row
_WINDOW = 5  # a sliding window short enough to hide something within these steps
_ROTARY_LIMIT = 10  # rotary factors change after the prefill


class CausalFlow:
    """Prefill and decode steps, through transformers' generation loop."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the parts of a causal LM with the model (see `verify_causal_cut`)."""
        return verify_causal_cut(model, proxy, sites)

    def run(self, job: Job) -> dict[str, Any]:
        """Generate.

        Returns:
            ``generated_ids [prompts, tokens]`` int64, and ``perf_metrics``.

        Raises:
            UsageError: The prompt does not fit, or the export is a stub.
        """
        from qeff_proxy.flows.generation.generate import generate_ids

        generated = generate_ids(job)
        return {"generated_ids": generated.ids, "perf_metrics": generated.perf}


def verify_causal_cut(
    model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent], seed: int = 0
) -> CutReport:
    """Compare the parts of a causal LM with the uncut model.

    Args:
        model: The uncut model, in evaluation mode.
        proxy: Its parts, of kind ``"split"`` or ``"whole"``.
        sites: The located sites, for the error message.
        seed: Of the random token ids.

    Raises:
        CutError: The parts cannot be run, or their logits differ; names the sites and the worst
            element.
    """
    generator = np.random.default_rng(seed)
    table_rows = model.get_input_embeddings().weight.shape[0]
    ids = generator.integers(0, table_rows, (2, sum(_STEPS)))
    engine = _engine_of(proxy)
    steps = _STEPS if engine.longest_step is None else _SINGLE_STEPS
    padding = np.ones_like(ids)
    padding[1, :_PADDING] = 0
    masked = any(mask.size is not None for part in proxy.parts for mask in part.masks)
    with shrunk_windows(model, _WINDOW, _ROTARY_LIMIT, masked=masked):
        try:
            expected = _model_logits(model, ids, padding, steps, grows=engine.keeps_positions)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be run as a causal LM over {sum(_STEPS)} "
                f"positions: {type(error).__name__}: {error}",
                "Check its config, or write a plugin for it.",
            ) from error
        with parts_must_run(model, sites):
            actual = _proxy_logits(engine, ids, padding)
        check = partial(
            check_equal,
            *(model, sites),
            actual=actual,
            valid=padding,
            output="logit",
            scanned=engine.longest_step is not None,
        )
        try:
            return check(expected=expected)
        except CutError:
            # Some see the padding in their own decode steps, where it must be hidden.
            short = (steps[0] - _PADDING, *steps[1:])
            row, ones = ids[1:, _PADDING:], np.ones_like(ids[1:, _PADDING:])
            alone = expected.copy()
            alone[1:, _PADDING:] = _model_logits(
                model, row, ones, short, grows=engine.keeps_positions
            )
            with suppress(CutError):
                return check(expected=alone)
            if engine.longest_step is not None:
                check_steps(model, ids[:1], expected[:1], actual[:1], grows=engine.keeps_positions)
            raise


def check_steps(
    model: PreTrainedModel, ids: Array, expected: Array, actual: Array, *, grows: bool
) -> None:
    """Blame the model if it computes what the parts do when it takes one position at a time."""
    ones = (1,) * ids.shape[1]
    steps = _model_logits(model, ids, np.ones_like(ids), ones, grows=grows)
    if np.abs(steps - actual).max() < 0.1 * np.abs(expected - actual).max():
        off = np.abs(steps - expected).max()
        raise UnsupportedModelError(
            f"{type(model).__name__} itself computes other logits one position at a time than over "
            f"a prompt: off by {off:.3g} of {np.abs(expected).max():.3g}",
            "Its recurrent layers are exported to take one position at a time, which is wrong for "
            "its prompts. Such layers often limit their time step in prompts only "
            "(time_step_min in the config).",
        )


def _model_logits(
    model: PreTrainedModel, ids: Array, padding: Array, steps: Sequence[int], *, grows: bool
) -> Array:
    """Logits of the uncut model, by its own cache and masks: ``[batch, sequence, vocabulary]``.

    A model whose cache does not grow takes the padding of the new positions only.
    """
    import inspect

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    pieces: list[Array] = []
    cache = None
    start = 0
    for length in steps:
        seen = padding[:, : start + length]
        arguments: dict[str, Any] = {
            "input_ids": to_tensor(ids[:, start : start + length]),
            "attention_mask": to_tensor(seen if grows else seen[:, start:]),
            cache_argument(model.forward): cache,
            "use_cache": True,
        }
        if takes_positions:
            arguments["position_ids"] = to_tensor(position_ids_of(seen, length))
        with torch.no_grad():
            outputs = model(**{n: v for n, v in arguments.items() if v is not None})
        pieces.append(to_array(outputs.logits.float()))
        start += length
        if has_cache(outputs):
            cache = cache_of(outputs)
        elif start < ids.shape[1]:  # it keeps none, so it has to run over all at once
            return _model_logits(model, ids, padding, (ids.shape[1],), grows=grows)
    return np.concatenate(pieces, axis=1)


def _engine_of(proxy: Proxy) -> CausalEngine:
    """Runs the parts in PyTorch, as `run` does on a backend."""
    parts = with_shrunk_masks(proxy.parts, _WINDOW)
    return CausalEngine(parts, {part.name: TorchSession(part) for part in parts})


def _proxy_logits(engine: CausalEngine, ids: Array, padding: Array) -> Array:
    """Logits of the parts: ``[batch, sequence, vocabulary]``."""
    pieces: list[Array] = []
    cache = None
    start = 0
    longest = engine.longest_step
    for index, length in enumerate(_STEPS if longest is None else [longest] * ids.shape[1]):
        logits, cache = engine.step(
            StepId("prefill", index),
            ids[:, start : start + length],
            padding[:, : start + length],
            cache,
        )
        pieces.append(logits.astype(np.float32))
        start += length
    return np.concatenate(pieces, axis=1)


def with_shrunk_masks(parts: Sequence[Part], size: int) -> list[Part]:
    """The parts with the windows of their masks shrunk like those of the model."""

    def shrunk(mask: MaskSpec) -> MaskSpec:
        return mask if mask.size is None else replace(mask, size=min(mask.size, size))

    return [replace(part, masks=tuple(map(shrunk, part.masks))) for part in parts]


@contextmanager
def shrunk_windows(
    model: PreTrainedModel, size: int, rotary_limit: int | None = None, *, masked: bool = True
) -> Iterator[None]:
    """Shrink the sliding windows and chunks in the model's configs to ``size``.

    Real windows are thousands of tokens long: on a short text, a cut that confused sliding and full
    attention would pass. The same holds for the position where rotary factors change: it becomes
    ``rotary_limit``, where that is given. Unless a mask of the parts has a window (``masked``),
    those that reach over all positions of the model hide nothing, and stay.
    """
    with ExitStack() as undo:

        def put(owner: Any, attribute: str, value: object) -> None:
            undo.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, value)

        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        for config in configs.values():
            positions = getattr(config, "max_position_embeddings", None) or math.inf
            for attribute in ("sliding_window", "attention_chunk_size"):
                try:
                    value = getattr(config, attribute, None)
                except RuntimeError as error:  # transformers', of a config with layers of its own
                    raise UnsupportedModelError(
                        f"{type(model).__name__} has a {attribute} of its own for some layers",
                        "A plugin for this model type can make the masks of each layer.",
                    ) from error
                if isinstance(value, int) and size < value < (math.inf if masked else positions):
                    put(config, attribute, size)
            for rope, limit in rotary_limits(config):
                if rotary_limit is None or limit <= rotary_limit:
                    continue
                if rope["rope_type"] == "longrope":
                    undo.callback(rope.__setitem__, LONGROPE_LIMIT, limit)
                    rope[LONGROPE_LIMIT] = rotary_limit
                    continue
                put(config, "max_position_embeddings", rotary_limit)
                for module in model.modules():
                    if getattr(module, "rope_type", None) == rope["rope_type"]:
                        put(module, "inv_freq", module.inv_freq)  # grows with the length
                        put(module, "original_max_seq_len", rotary_limit)
                        put(module, "max_seq_len_cached", rotary_limit)
        yield
