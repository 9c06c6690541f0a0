"""Run the whole model on a backend, with or without a recipe, and compare it with PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from qeff_proxy.arrays import Array, to_array
from qeff_proxy.backends.compile_export import compile_export, fixed_lengths, open_sessions
from qeff_proxy.backends.lengths import DEFAULT_CTX_LEN
from qeff_proxy.backends.recipe import OPTION, Recipe
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError
from qeff_proxy.flows.causal_engine import CausalEngine
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.precision.distance import Distance, distance_of
from qeff_proxy.precision.prepare import Prepared
from qeff_proxy.run.calibration import takes_calibration, with_calibration
from qeff_proxy.score.score_tokens import all_logits
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.verify.verify_model import live_proxy, verify_model


def run_backend(
    ready: Prepared, backend: str, recipe: Recipe | None, progress: Callable[[str], None]
) -> Distance:
    """How far a backend's last outputs are from PyTorch's, on the input of the search.

    Of a causal language model these are the logits of all positions, else what `verify_model`
    compares.

    Raises:
        BackendError: The backend refuses the whole model, or fails on it.
    """
    with tempfile.TemporaryDirectory(prefix="qeff-proxy-") as folder:
        chosen = dict(ready.options.backends[backend])
        if recipe is not None:
            chosen[OPTION] = str(Path(folder) / "recipe.toml")
            recipe.write(Path(chosen[OPTION]))
        options = replace(
            ready.options,
            backends={**ready.options.backends, backend: chosen},
            io_folder=Path(folder) / "io",
        )
        ids = ready.tensors.get("input_ids")
        if ready.export.flow == "causal-lm" and ids is not None:
            ready = replace(ready, options=options)
            return _on_all_positions(ready, backend, to_array(ids), progress)
        (result,) = verify_model(
            ready.model, [backend], ready.request, options, hooks=ready.hooks, progress=progress
        ).results
    if result.error is not None or result.sqnr is None:
        raise BackendError(
            f"{backend} fails on the whole model: {result.error}",
            "With --no-proof the recipe is that of the simulation alone.",
        )
    same = result.equal_tokens / result.tokens if result.tokens else None
    return Distance(result.sqnr, None, same, result.tokens)


def _on_all_positions(
    ready: Prepared, backend: str, ids: Array, progress: Callable[[str], None]
) -> Distance:
    """Compare the logits of a causal language model."""
    options = _compile_options(ready, backend, ids.shape[1], progress)
    compiled = compile_export(ready.export, backend, options, check=True, progress=progress)
    given = ready.tensors.get("attention_mask")
    padding = np.ones(ids.shape, np.int64) if given is None else to_array(given)
    parts, adapter = ready.export.parts, ready.export.adapter
    with open_sessions(compiled, ready.hooks) as sessions:
        engine = CausalEngine(parts, sessions, adapter=adapter)
        actual = all_logits(engine, ids, options.prefill_seq_len, padding)
    loaded = ready.model if isinstance(ready.model, LoadedModel) else None
    live = live_proxy(loaded, ready.hooks, ready.export)
    torch = {part.name: TorchSession(part) for part in live.parts}
    expected = all_logits(CausalEngine(parts, torch, adapter=adapter), ids, None, padding)
    return distance_of([{"logits": expected}], [{"logits": actual}], ready.tensors)


def _compile_options(
    ready: Prepared, backend: str, length: int, progress: Callable[[str], None]
) -> CompileOptions:
    """The backend's options, with room for the input and the inputs to calibrate on."""
    options = ready.options.compile_for(backend)
    if load_backend(backend).needs_fixed_shapes(options):
        if options.ctx_len is None and length > DEFAULT_CTX_LEN:
            options = replace(options, ctx_len=length)
        options = fixed_lengths(ready.export, options)
    if takes_calibration(backend):
        given = ready.options.calibration
        options = with_calibration(
            ready.export, ready.hooks, backend, options, given, progress=progress
        )
    return options
