"""Decoders whose layers keep states of convolutions and recurrences, beside keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from qeff_proxy.backends.compile_export import Compiled, compile_export
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.export.trace.trace_part import trace_part
from qeff_proxy.families.model_cache import cache_of
from qeff_proxy.flows.generation.step_cache import StepCache
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import RunResult, run_compiled
from qeff_proxy.verify.by_layer import verify_layers
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.self_check import verify_self

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export
    from transformers import PreTrainedModel

NEW = 6
IDS = np.array([[5, 60, 7, 80, 9, 100, 11, 12], [0, 0, 0, 18, 47, 120, 33, 21]])
MASK = (IDS > 0) * 1
KINDS = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}


class Case(NamedTuple):
    """A checkpoint, exported."""

    model: PreTrainedModel
    folder: Path
    export: Export

    def run(self, options: CompileOptions | None = None, **settings: Any) -> RunResult:
        """Generate from the padded batch, in ONNX Runtime or on another backend."""
        backend = settings.pop("backend", "onnxruntime")
        compiled: Compiled = compile_export(self.export, backend, options)
        inputs = {"input_ids": IDS, "attention_mask": MASK, **settings.pop("inputs", {})}
        dump = {name: settings.pop(name) for name in list(settings) if name.startswith("io_")}
        return run_compiled(
            compiled,
            Plugins.discover().hooks_for(self.export.model["model_type"]),
            Request(inputs=inputs),
            settings={"max_new_tokens": NEW, "do_sample": False, **settings},
            write_io=bool(dump),
            **dump,
        )

    def eager(self, **settings: Any) -> Any:
        """What transformers generates, with the logits of each step."""
        return self.model.generate(
            torch.from_numpy(IDS),
            attention_mask=torch.from_numpy(MASK),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )


def exported(model: PreTrainedModel, folder: Path) -> Case:
    """A checkpoint of a model, exported with layer taps."""
    model.save_pretrained(folder / "checkpoint")
    loaded = load_model(str(folder / "checkpoint"))
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    return Case(
        model,
        folder / "checkpoint",
        export_model(loaded, hooks, output=folder / "export", taps="layers"),
    )


@pytest.fixture(scope="module")
def lfm2(make_model, tmp_path_factory) -> Case:
    model = make_model("lfm2", layers=6, layer_types=KINDS, full_attn_idxs=None)
    return exported(model, tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(scope="module")
def falcon(make_model, tmp_path_factory) -> Case:
    """Each of its layers has keys, values, and both kinds of states."""
    model = make_model("falcon_h1", layers=5, **MAMBA, mamba_d_ssm=64)
    return exported(model, tmp_path_factory.mktemp("falcon"))


def test_a_state_is_a_tensor_of_its_layer_with_axes_of_its_own(lfm2: Case, falcon: Case) -> None:
    body = lfm2.export.part("body")
    shapes = {spec.name: spec.shape for spec in (*body.inputs, *body.outputs)}
    assert shapes["past_key_values.0.conv_state"] == ("batch", 64, 3)
    assert shapes["present.0.conv_state"] == ("batch", 64, 3)
    assert "past_key_values.0.key" not in shapes
    assert shapes["past_key_values.1.key"] == ("batch", 2, "past", 16)
    assert "past_key_values.1.conv_state" not in shapes
    body = falcon.export.part("body")
    shapes = {spec.name: spec.shape for spec in body.inputs}
    assert shapes["inputs_embeds"] == ("batch", 1, 64)
    assert shapes["past_key_values.4.key"] == ("batch", 2, "past", 16)
    assert shapes["past_key_values.4.conv_state"] == ("batch", 96, 4)
    assert shapes["past_key_values.4.recurrent_state"] == ("batch", 4, 16, 16)


@pytest.mark.parametrize(("name", "kinds"), [("lfm2", 2), ("falcon", 1)])
def test_only_the_first_layers_are_run_and_one_of_each_kind_is_traced(
    name: str, kinds: int, request: pytest.FixtureRequest
) -> None:
    cut = request.getfixturevalue(name).export.cut
    assert cut["weights"].startswith("streamed from the checkpoint;")
    assert cut["layers"]["verified"] == 2
    assert cut["traced_layers"]["body"] == kinds


@pytest.mark.parametrize(("name", "chunk"), [("lfm2", None), ("lfm2", 3), ("falcon", None)])
def test_tokens_logits_and_states_of_a_padded_batch_are_those_of_the_model(
    name: str, chunk: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue(name)
    eager = case.eager()
    result = case.run(CompileOptions(prefill_seq_len=chunk), io_folder=tmp_path / "io")
    assert np.array_equal(result.outputs["generated_ids"], eager.sequences[:, IDS.shape[1] :])
    assert len(set(eager.sequences[0].tolist())) > NEW
    dump = read_dump(tmp_path / "io")
    last = [step for step in dump.steps if step.phase == "prefill"][-1].index
    steps = [("prefill", last), *(("decode", index) for index in range(NEW - 1))]
    for (phase, index), expected in zip(steps, eager.logits, strict=True):
        logits = dump.array(phase, index, "lm_head.out.logits")[:, -1]
        assert np.abs(logits - expected.numpy()).max() < 1e-5 * np.abs(expected.numpy()).max()
    states = 0
    for index, layer in enumerate(cache_of(eager).layers):
        for kind in ("conv", "recurrent"):
            for expected in getattr(layer, f"{kind}_states", {}).values():
                if expected is not None:
                    name = f"body.out.present_{kind}_state.layer-{index:02d}"
                    state = dump.array("decode", NEW - 2, name)
                    assert np.abs(state - expected.numpy()).max() < 1e-4
                    states += 1
    assert states == {"lfm2": 4, "falcon": 10}[case.export.model["model_type"].split("_")[0]]


def test_beams_take_their_states_with_them(lfm2: Case) -> None:
    beams = lfm2.eager(num_beams=3).sequences[:, IDS.shape[1] :]
    assert not torch.equal(beams, lfm2.eager().sequences[:, IDS.shape[1] :])
    assert np.array_equal(lfm2.run(num_beams=3).outputs["generated_ids"], beams)


def test_no_position_can_be_taken_back_from_a_state() -> None:
    cache = StepCache()
    cache.hold({"past_key_values.0.conv_state": np.zeros((1, 4, 3), np.float32)}, 5)
    cache.crop(0)
    with pytest.raises(UsageError, match="states"):
        cache.crop(-1)


def test_two_backends_are_compared_state_by_state(lfm2: Case, tmp_path: Path) -> None:
    for backend in ("torch", "onnxruntime"):
        lfm2.run(io_folder=tmp_path / backend, backend=backend)
    comparison = compare_dumps(tmp_path / "torch", tmp_path / "onnxruntime")
    assert comparison.passed
    assert "body.out.present_conv_state.layer-03" in {str(pair.name) for pair in comparison.tensors}


@pytest.mark.parametrize(("name", "layers"), [("lfm2", 6), ("falcon", 5)])
def test_each_layer_is_verified_alone(
    name: str, layers: int, request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue(name)
    batch = Request(inputs={"input_ids": IDS, "attention_mask": MASK})
    options = VerifyOptions(max_new_tokens=3, output=case.export.folder)
    result = verify_layers(str(case.folder), request=batch, options=options)
    assert result.passed, result.results
    (backend,) = result.results
    assert [layer.layer for layer in backend.layers] == [None, *range(layers), None, None]


def test_padding_batches_and_chunks_change_no_layer(falcon: Case) -> None:
    one = Request(inputs={"input_ids": IDS[:1], "attention_mask": MASK[:1]})
    options = VerifyOptions(max_new_tokens=3)
    result = verify_self(falcon.export, request=one, options=options)
    assert result.passed, result.results


CUT: list[tuple[str, dict[str, Any]]] = [
    ("bamba", {**MAMBA, "attn_layer_indices": [1, 3], "mamba_expand": 1}),
    ("falcon_mamba", {"state_size": 8}),
    ("granitemoehybrid", {**MAMBA, **HYBRID, "mamba_expand": 1}),
    ("jamba", {}),
    ("mamba2", {"num_heads": 4, "head_dim": 16, "expand": 1, "n_groups": 1, "state_size": 16}),
    ("olmo_hybrid", HYBRID),
    ("qwen3_5_text", HYBRID),
    ("qwen3_next", HYBRID),
    ("zamba", {"layer_types": ["linear_attention", "hybrid"] * 2 + ["linear_attention"]}),
]


@pytest.mark.parametrize(("model_type", "changes"), CUT, ids=[name for name, _ in CUT])
def test_parts_with_recurrent_states_equal_the_model(
    model_type: str, changes: dict[str, Any], make_model: Any
) -> None:
    hooks = Plugins.discover().hooks_for(model_type)
    model = make_model(model_type, layers=5, **changes)
    cut = cut_model(wrap_model(model), hooks, "split")
    assert cut.report is not None
    assert cut.report.largest_value > 0.2
    assert any("recurrent_state" in spec.name for spec in cut.proxy.part("body").outputs)


def test_a_model_that_differs_from_itself_step_by_step_is_refused(make_model: Any) -> None:
    model = make_model("bamba", layers=5, **{**CUT[0][1], "time_step_limit": (0.5, 1.0)})
    with pytest.raises(UnsupportedModelError, match="itself computes other logits one position"):
        cut_model(wrap_model(model), Plugins.discover().hooks_for("bamba"), "split")


def test_a_state_in_float32_stays_so_in_a_model_in_half_precision(make_model: Any) -> None:
    model = make_model("mamba", state_size=8).half()
    body = cut_model(wrap_model(model), Plugins.discover().hooks_for("mamba"), "split").proxy.part(
        "body"
    )
    specs = {spec.name: spec.dtype for spec in (*body.inputs, *body.outputs)}
    assert specs["present.0.conv_state"] == "float16"
    assert specs["past_key_values.0.recurrent_state"] == specs["last_hidden_state"] == "float32"
    graph = trace_part(body, {}).model.graph
    traced = {str(v.name): v.dtype.numpy().name for v in (*graph.inputs, *graph.outputs)}
    assert traced == {name: specs[name] for name in traced}
