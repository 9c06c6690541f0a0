"""The rewritten graph is compared with the exported one: models that read the length of the keys.

The oracle is transformers' eager model.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.export.export_model import export_model
from qeff_proxy.families.model_cache import cache_of
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins

if TYPE_CHECKING:
    from pathlib import Path

    from qeff_proxy.artifact.manifest_schema import Export
    from transformers import PreTrainedModel

#: Models that take a window or positions from the length of the keys, and their settings.
READS_KEY_LENGTH = [
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 6}),
    ("roformer", {"is_decoder": True, "embedding_size": 64}),
    ("trocr", {"d_model": 64, "decoder_layers": 5}),
]
STEPS = (7, 60, 1, 1)  # from one block of the cache's buffers into the next


def eager_logits(model: PreTrainedModel, ids: Any) -> Any:
    pieces, cache, start = [], None, 0
    for length in STEPS:
        with torch.no_grad():
            out = model(
                input_ids=torch.from_numpy(ids[:, start : start + length]),
                attention_mask=torch.ones(len(ids), start + length, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
        cache = cache_of(out)
        pieces.append(out.logits.numpy())
        start += length
    return np.concatenate(pieces, axis=1)


def logits_of(export: Export, ids: Any, **options: Any) -> tuple[Any, bool]:
    """Logits over the same steps, and whether the cache was written in place."""
    compiled = compile_export(export, options=CompileOptions(backend=options))
    pieces, cache, start = [], None, 0
    with open_sessions(compiled) as sessions:
        engine = CausalEngine(export.parts, sessions)
        for index, length in enumerate(STEPS):
            logits, cache = engine.step(
                StepId("prefill", index),
                ids[:, start : start + length],
                np.ones((len(ids), start + length), np.int64),
                cache,
            )
            pieces.append(logits)
            start += length
        in_place = sessions["body"].runs_in_place()  # type: ignore[attr-defined]
    return np.concatenate(pieces, axis=1), in_place


@pytest.mark.parametrize(("model_type", "settings"), READS_KEY_LENGTH)
def test_a_model_that_reads_the_key_length_gives_the_logits_of_eager(
    model_type: str, settings: dict[str, Any], make_model: Any
) -> None:
    model = make_model(model_type, **settings)
    export = export_model(wrap_model(model), Plugins.discover().hooks_for(model_type))
    ids = np.random.default_rng(5).integers(3, 131, (2, sum(STEPS)))
    expected = eager_logits(model, ids)
    actual, in_place = logits_of(export, ids)
    assert not in_place
    assert np.abs(actual - expected).max() < 1e-4


def test_a_model_that_reads_no_key_length_keeps_its_cache_in_place(demo_export: Path) -> None:
    """The comparison has no false alarm, with 8-bit weights as well."""
    export = read_export(demo_export)
    ids = np.random.default_rng(5).integers(3, 31, (1, sum(STEPS)))
    for options in ({}, {"weights": "int8"}):
        assert logits_of(export, ids, **options)[1]


def test_quantized_weights_that_say_something_else_are_warned_of(
    demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer as Sound

    def negated(self: Any, weight: Any) -> Any:
        values, scales, zero_points = sound(self, weight)
        return values, -scales, zero_points

    sound = Sound.qbits_block_quant
    monkeypatch.setattr(Sound, "qbits_block_quant", negated)
    folder = shutil.copytree(demo_export, tmp_path / "export")
    options = CompileOptions(ctx_len=61, backend={"weights": "int8"})
    with pytest.warns(UserWarning, match="of the body part has a cosine of .* to that of the exp"):
        compile_export(read_export(folder), options=options)


def test_a_part_whose_comparison_would_take_long_is_not_rewritten(
    demo_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qeff_proxy.backends.onnxruntime.check_rewriting._MOST_ELEMENTS", 9)
    export = read_export(demo_export)
    compiled = compile_export(export, options=CompileOptions(ctx_len=60))
    with open_sessions(compiled) as sessions:
        assert not sessions["body"].runs_in_place()  # type: ignore[attr-defined]
