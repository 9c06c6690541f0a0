"""The generic plugin carries these architectures: parity from the exported ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.export.export_model import export_model
from qeff_proxy.families.model_cache import cache_argument, cache_of
from qeff_proxy.flows.causal_engine import CausalEngine, StepId, position_ids_of
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoe",
    "cohere",
    "olmo2",
    "falcon",
    "gptj",
    "gpt_neox",
    "opt",
    "bloom",
    "mpt",
    "starcoder2",
    "stablelm",
    "smollm3",
    "gpt_oss",
    "codegen",
    "gpt2",
]
STEPS = (7, 5, 1, 1)  # longer in all than the sliding windows of the small configs
TOLERANCE = 1e-4


def eager_logits(model: PreTrainedModel, ids: Any, padding: Any) -> Any:
    """Logits of the uncut model over the same steps, with its own cache and masks."""
    import inspect

    positions = "position_ids" in inspect.signature(model.forward).parameters
    pieces, cache, start = [], None, 0
    for length in STEPS:
        seen = padding[:, : start + length]
        extra = {}
        if positions:
            extra["position_ids"] = torch.from_numpy(position_ids_of(seen, length))
        if cache is not None:
            extra[cache_argument(model.forward)] = cache
        with torch.no_grad():
            out = model(
                input_ids=torch.from_numpy(ids[:, start : start + length]),
                attention_mask=torch.from_numpy(seen),
                use_cache=True,
                **extra,
            )
        cache = cache_of(out)
        pieces.append(out.logits.numpy())
        start += length
    return np.concatenate(pieces, axis=1)


# Four layers are traced once per kind and repeated; the plain trace of two is tried on some.
CASES = [(name, 4) for name in ARCHITECTURES] + [("gpt2", 2), ("gemma2", 2), ("mixtral", 2)]


@pytest.mark.parametrize(("model_type", "layers"), CASES)
def test_the_exported_graphs_give_the_logits_of_the_uncut_model(
    model_type: str, layers: int, make_model: Any
) -> None:
    model = make_model(model_type, layers=layers)
    loaded = wrap_model(model)
    export = export_model(loaded, Plugins.discover().hooks_for(model_type))
    assert export.cut["traced_layers"].get("body", 0) in ((1, 2) if layers == 4 else (0,))
    generator = np.random.default_rng(5)
    ids = generator.integers(3, 131, (2, sum(STEPS)))
    padding = np.ones_like(ids)
    padding[1, :3] = 0
    pieces, cache, start = [], None, 0
    with open_sessions(compile_export(export)) as sessions:
        engine = CausalEngine(export.parts, sessions)
        for index, length in enumerate(STEPS):
            logits, cache = engine.step(
                StepId("prefill", index),
                ids[:, start : start + length],
                padding[:, : start + length],
                cache,
            )
            pieces.append(logits)
            start += length
    actual = np.concatenate(pieces, axis=1)
    expected = eager_logits(model, ids, padding)
    real = padding.astype(bool)
    assert np.abs(expected[real]).max() > 0.2  # there is something to compare
    assert np.abs(actual[real] - expected[real]).max() < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "scale", "follows"),
    [
        ("gemma2", 8.0, ("div", "tanh", "mul")),
        ("granite", None, ("div",)),
        ("cohere", None, ("mul",)),
        ("llama", None, ()),
    ],
)
def test_what_surrounds_the_ends_is_found(
    model_type: str, scale: float | None, follows: tuple[str, ...], make_model: Any
) -> None:
    model = make_model(model_type)
    hooks = Plugins.discover().hooks_for(model_type)
    embedding = hooks.locate_embedding(model=model, config=model.config)
    head = hooks.locate_lm_head(model=model, config=model.config)
    assert isinstance(embedding, Site)
    assert embedding.scale == scale
    assert isinstance(head, Site)
    assert head.follows == follows
