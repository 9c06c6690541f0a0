"""Decoders that keep no cache: at each step they run over all inputs so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.cut.inspect_model import inspect_model
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult, run_compiled
from qeff_proxy.testing import random_weights
from qeff_proxy.verify import verify_model
from qeff_proxy.verify.by_layer import verify_layers
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.self_check import verify_self
from transformers import (
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

NEW = 6
IDS = np.array([[5, 60, 7, 80, 9, 100, 11, 12], [0, 0, 0, 18, 47, 120, 33, 21]])
MASK = (IDS > 0) * 1
BATCH = Request(inputs={"input_ids": IDS, "attention_mask": MASK})


class Case(NamedTuple):
    """A checkpoint, exported with layer taps."""

    model: Any
    folder: Path
    export: Export

    def run(self, options: CompileOptions | None = None, **more: Any) -> RunResult:
        """Generate from the padded batch."""
        compiled = compile_export(self.export, more.pop("backend", "onnxruntime"), options)
        hooks = Plugins.discover().hooks_for("openai-gpt")
        beams = more.pop("num_beams", 1)
        settings = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}
        return run_compiled(compiled, hooks, BATCH, settings=settings, write_io=bool(more), **more)


@pytest.fixture(scope="module")
def gpt(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The first GPT."""
    model, folder = make_model("openai-gpt", seed=1, layers=5), tmp_path_factory.mktemp("gpt")
    with torch.no_grad():  # so that it does not repeat one token
        for block in model.transformer.h:
            block.mlp.c_proj.weight.mul_(8)
        model.transformer.positions_embed.weight.mul_(10)
    model.save_pretrained(folder / "checkpoint")
    loaded = load_model(str(folder / "checkpoint"))
    hooks = Plugins.discover().hooks_for("openai-gpt")
    export = export_model(loaded, hooks, output=folder / "export", taps="layers")
    return Case(model, folder / "checkpoint", export)


def alone(model: Any, **settings: Any) -> list[Any]:
    """What transformers generates from each row without its padding, which its `generate` sees."""
    prompts = [torch.from_numpy(row[seen > 0])[None] for row, seen in zip(IDS, MASK, strict=True)]
    more = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return [
        model.generate(one, **more, return_dict_in_generate=True, output_logits=True)
        for one in prompts
    ]


@pytest.mark.parametrize("chunk", [None, 3])
def test_tokens_and_logits_of_a_padded_batch_are_those_of_each_row_alone(
    gpt: Case, chunk: int | None, tmp_path: Any
) -> None:
    expected = alone(gpt.model)
    result = gpt.run(CompileOptions(prefill_seq_len=chunk), io_folder=tmp_path / "io")
    tokens = torch.cat([one.sequences[:, -NEW:] for one in expected]).numpy()
    assert np.array_equal(result.outputs["generated_ids"], tokens)
    assert len(set(tokens.ravel().tolist())) > NEW // 2
    dump = read_dump(tmp_path / "io")
    last = [step for step in dump.steps if step.phase == "prefill"][-1].index
    steps = [("prefill", last), *(("decode", index) for index in range(NEW - 1))]
    for number, (phase, index) in enumerate(steps):
        wanted = torch.cat([one.logits[number] for one in expected]).numpy()
        logits = dump.array(phase, index, "lm_head.out.logits")[:, -1]
        assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()
    seen = dump.array("decode", NEW - 2, "body.out.present_past_inputs.layer-00")
    assert seen.shape == (2, 1, IDS.shape[1] + NEW - 1, 64)
    assert dump.array("decode", 0, "body.out.hidden_states.layer-03").shape == (2, 1, 64)


def test_beams_are_those_of_the_model(gpt: Case) -> None:
    expected = alone(gpt.model, num_beams=3)
    result = gpt.run(num_beams=3).outputs["generated_ids"]
    assert np.array_equal(result, torch.cat([one.sequences[:, -NEW:] for one in expected]).numpy())


def test_two_backends_and_other_arrangements_agree_at_each_tap(gpt: Case, tmp_path: Any) -> None:
    options = VerifyOptions(max_new_tokens=3, taps="layers,attention,q")
    assert verify_model(str(gpt.folder), ["onnxruntime"], request=BATCH, options=options).passed
    for backend in ("torch", "onnxruntime"):
        gpt.run(io_folder=tmp_path / backend, backend=backend)
    assert compare_dumps(tmp_path / "torch", tmp_path / "onnxruntime").passed
    one = Request(inputs={"input_ids": IDS[:1], "attention_mask": MASK[:1]})
    found = verify_self(gpt.export, request=one, options=VerifyOptions(max_new_tokens=3))
    assert found.passed, found.results


def test_no_layer_is_run_alone(gpt: Case) -> None:
    options = VerifyOptions(max_new_tokens=2, output=gpt.export.folder)
    with pytest.raises(UnsupportedModelError, match="its layers run over all positions"):
        verify_layers(str(gpt.folder), options=options)


def test_its_first_layers_are_run_and_one_is_traced(gpt: Case, tmp_path: Any) -> None:
    loaded = load_model(str(gpt.folder))
    hooks = Plugins.discover().hooks_for("openai-gpt")
    export = export_model(loaded, hooks, output=tmp_path / "plain")
    assert export.cut["layers"]["verified"] == 2
    assert export.cut["traced_layers"]["body"] == 1
    shapes = {spec.name: spec.shape for spec in export.part("body").inputs}
    assert shapes["past_key_values.0.past_inputs"] == ("batch", 1, "past", 64)
    assert shapes["position_ids"] == ("batch", "past + query")
    assert "present.0.past_inputs" in inspect_model(loaded, hooks).parts["body"]["gives"]


def test_a_graph_without_weights_keeps_token_ids(gpt: Case, tmp_path: Any) -> None:
    hooks = Plugins.discover().hooks_for("openai-gpt")
    (part,) = export_model(
        load_model(str(gpt.folder)), hooks, output=tmp_path / "stub", kind="stub"
    ).parts
    specs = {spec.name: (spec.dtype, spec.shape) for spec in part.inputs}
    assert specs["past_key_values.0.past_inputs"] == ("int64", ("batch", 1, "past", 1))


SMALL = {"n_layers": 5, "n_heads": 4, "emb_dim": 32, "vocab_size": 99}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: XLMWithLMHeadModel(XLMConfig(**SMALL)), "changes with later ones"),
        (
            lambda: XLNetLMHeadModel(
                XLNetConfig(vocab_size=99, d_model=32, n_layer=5, n_head=4, d_inner=64)
            ),
            "keeps no cache, .*; what it gives for a position changes with later ones",
        ),
        (
            lambda: XLMWithLMHeadModel(XLMConfig(**SMALL, causal=True)),
            "puts 1 of its own tokens behind a prompt",
        ),
    ],
    ids=["xlm", "xlnet", "causal xlm"],
)
def test_what_is_not_causal_or_adds_tokens_is_refused(make: Any, reason: str) -> None:
    model = random_weights(make())
    hooks = Plugins.discover().hooks_for(model.config.model_type)
    with pytest.raises(UnsupportedModelError, match=reason):
        cut_model(wrap_model(model), hooks, "split")
