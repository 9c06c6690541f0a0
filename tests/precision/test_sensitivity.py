"""What is simulated, against PyTorch's own layers with their tensors rounded by hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qeff_proxy_vision
import torch
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.graph.modules import chosen_units, kind_of, layer_in
from qeff_proxy.precision.prepare import prepare
from qeff_proxy.precision.sensitivity import Sensitivity, measure_sensitivity
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model
from torch.nn.functional import kl_div
from transformers import AutoModelForImageTextToText, BertConfig, BertModel

pytestmark = pytest.mark.one_home

IDS = np.arange(3, 43)[None] * 3 % 131
REQUEST = Request(inputs={"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", layers=6)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint):
    """Measures a precision once, with each unit."""
    found: dict[tuple[str, str], Sensitivity] = {}

    def measure(precision: str, backend: str = "onnxruntime") -> Sensitivity:
        if (precision, backend) not in found:
            found[precision, backend] = measure_sensitivity(
                str(checkpoint), backend, precision, REQUEST, each=True
            )
        return found[precision, backend]

    return measure


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[0]


def sqnr(reference: torch.Tensor, actual: torch.Tensor) -> float:
    noise = (reference - actual).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


@contextmanager
def rounded(modules: list[torch.nn.Module], change) -> Iterator[None]:
    """Let modules read, hold and give what ``change`` makes of it."""
    handles, kept = [], []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda _m, args: (change(args[0]),)))
        handles.append(module.register_forward_hook(lambda _m, _args, out: change(out)))
        kept.append(module.weight.data)
        module.weight.data = change(kept[-1])
    try:
        yield
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight.data = weight
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_module_low_is_that_module_of_pytorch_rounded(model, measured, precision, dtype):
    reference = logits_of(model)
    found = measured(precision, "openvino")
    rows = {row.name: row for row in (*found.units, *found.kinds)}
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    for name, modules in ((DOWN, downs[2:3]), ("mlp.down_proj", downs)):
        with rounded(modules, lambda t: t.to(dtype).float()):
            actual = logits_of(model)
        assert rows[name].low.sqnr == pytest.approx(sqnr(reference, actual), abs=0.2)
        p, q = (t.double().log_softmax(-1) for t in (reference, actual))
        divergence = kl_div(q, p, log_target=True, reduction="sum") / len(p)
        assert rows[name].low.kl == pytest.approx(float(divergence), rel=0.1, abs=1e-9)
        assert rows[name].low.positions == IDS.size


def test_a8w8_rounds_to_steps_of_the_observed_range(model, measured):
    """Of one module, whose own input and output ranges PyTorch's hooks tell."""
    reference, downs = logits_of(model), model.model.layers[2].mlp.down_proj
    seen: list[torch.Tensor] = []
    hook = downs.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
    logits_of(model)
    hook.remove()

    def steps(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        low, high = min(float(like.min()), 0.0), max(float(like.max()), 0.0)
        scale = (high - low) / 255
        zero = round(-low / scale)
        return (torch.clamp(torch.round(tensor / scale) + zero, 0, 255) - zero) * scale

    weight = downs.weight.data
    scales = weight.abs().amax(1, keepdim=True) / 127
    handles = [
        downs.register_forward_pre_hook(lambda _m, args: (steps(args[0], seen[0]),)),
        downs.register_forward_hook(lambda _m, _args, out: steps(out, seen[1])),
    ]
    downs.weight.data = torch.round(weight / scales) * scales
    actual = logits_of(model)
    downs.weight.data = weight
    for handle in handles:
        handle.remove()
    row = next(row for row in measured("a8w8", "qnn").units if row.name == DOWN)
    assert row.low.sqnr == pytest.approx(sqnr(reference, actual), abs=0.5)


def test_a16w8_is_the_rounding_of_weights(demo_checkpoint, eager):
    """Of products that read their weights untransposed; 16 bits of activations cost nothing."""
    ids, reference = IDS % 500, None
    with torch.no_grad():
        reference = eager(input_ids=torch.tensor(ids)).logits[0]
        weight = eager.transformer.h[1].mlp.c_fc.weight
        kept = weight.data.clone()
        scales = kept.abs().amax(0, keepdim=True) / 127
        weight.data.copy_(torch.round(kept / scales) * scales)
        actual = eager(input_ids=torch.tensor(ids)).logits[0]
        weight.data.copy_(kept)
    request = Request(inputs={"input_ids": ids, "attention_mask": np.ones_like(ids)})
    found = measure_sensitivity(str(demo_checkpoint), "qnn", "a16w8", request, each=True)
    row = next(row for row in found.units if row.name == "transformer.h.1.mlp.c_fc")
    assert row.low.sqnr == pytest.approx(sqnr(reference, actual), abs=0.2)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_all_low_is_what_the_backend_computes(model, checkpoint, measured, precision):
    found = measured(precision)
    export = read_export(prepared(checkpoint, precision).export.folder)
    options = CompileOptions(backend={"weights": precision})
    with open_sessions(compile_export(export, "onnxruntime", options)) as sessions:
        engine = CausalEngine(export.parts, sessions)
        actual, _ = engine.step(StepId("prefill", 0), IDS, np.ones_like(IDS), None)
    expected = sqnr(logits_of(model), torch.tensor(actual[0].copy()))
    assert found.low.sqnr == pytest.approx(expected, abs=0.3)


def prepared(checkpoint: Path, precision: str, backend: str = "onnxruntime"):
    return prepare(
        str(checkpoint), backend, precision, REQUEST, None, None,
        trust_remote_code=False, progress=lambda _stage: None,
    )  # fmt: skip


def test_both_views_by_layer_and_by_kind(measured):
    found = measured("int4")
    assert [row.name for row in found.layers] == [f"model.layers.{n}" for n in range(6)]
    products = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(row.name.split(".")[1] for row in found.kinds) == sorted(products)
    assert sum(row.share for row in found.layers) == pytest.approx(
        sum(row.share for row in found.kinds)
    )
    for row in (*found.layers, *found.kinds):
        assert row.low.sqnr > found.low.sqnr
    assert max(row.wide.sqnr for row in found.layers) > found.low.sqnr + 0.3


def test_functional_operators_are_units_of_their_own(measured):
    kinds = {row.name for row in measured("fp16", "openvino").kinds}
    assert {"self_attn:Softmax", "self_attn:MatMul", "mlp.act_fn", "input_layernorm"} <= kinds
    assert {"model.embed_tokens", "lm_head", "model.norm"} <= kinds


def test_what_a_backend_leaves_to_the_host_stays_wide(measured):
    """HTP's compiler gets no part that holds the vocabulary; ONNX Runtime's head is an option."""
    for found in (measured("a8w8", "qnn"), measured("int8")):
        assert not {"lm_head", "model.embed_tokens"} & {row.name for row in found.kinds}


def test_a_variant_alone_is_the_variant_among_others(checkpoint):
    variants = prepared(checkpoint, "int4").variants
    names = list(variants.units)
    some = [{names[0]}, set(names[5:20]), set(names), {names[-1]}]
    together = variants.measure(some)
    for one, expected in zip(some, together, strict=True):
        (alone,) = variants.measure([one])
        assert alone.sqnr == pytest.approx(expected.sqnr, abs=0.05)
    (nothing,) = variants.measure([set()])
    assert nothing.sqnr == math.inf


def test_numbers_beyond_float16_are_named(make_model, tmp_path):
    model = make_model("llama", layers=5)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight *= 3e5
        model.model.layers[3].mlp.down_proj.weight /= 3e5
    model.save_pretrained(tmp_path / "llama")
    found = measure_sensitivity(str(tmp_path / "llama"), "openvino", "fp16", REQUEST)
    over = {one.name for one in found.ranges if one.overflows}
    assert "model.layers.3.mlp.up_proj" in over
    assert all(name.startswith("model.layers.3.mlp") for name in over)
    assert found.low.sqnr == -math.inf  # infinite: 0 x infinity is no number
    rows = {row.name: row for row in found.layers}
    assert rows["model.layers.3"].wide.sqnr > 40 > rows["model.layers.3"].low.sqnr
    assert rows["model.layers.2"].low.sqnr > 40


def test_an_encoder_has_no_divergence_of_tokens(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=131, num_hidden_layers=5, max_position_embeddings=64)
    random_weights(BertModel(config).eval(), 0).save_pretrained(tmp_path / "bert")
    found = measure_sensitivity(str(tmp_path / "bert"), "qnn", "a16w8", REQUEST)
    assert len(found.layers) == 5
    assert found.low.kl is None
    assert 10 < found.low.sqnr < min(row.low.sqnr for row in found.layers)


def test_what_an_early_part_loses_reaches_the_last_outputs():
    """Of a vision tower, a projector and a decoder, each in a part of its own or two."""
    folder = Path(qeff_proxy_vision.__file__).parent / "checkpoints" / "tiny-llava"
    found = measure_sensitivity(str(folder), "onnxruntime", "int4")
    rows = {row.name: row for row in (*found.layers, *found.kinds)}
    towers = [row for name, row in rows.items() if "vision_tower" in name]
    assert len(towers) == 3
    unread = "model.vision_tower.encoder.layers.2"  # the model takes the layer before
    assert rows.pop(unread).low.sqnr > 100
    assert all(row.low.sqnr < 90 for row in rows.values())
    options = VerifyOptions(max_new_tokens=1, backends={"onnxruntime": {"weights": "int4"}})
    (real,) = verify_model(str(folder), ["onnxruntime"], options=options).results
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    head = model.get_output_embeddings().weight.detach()
    reference, actual = (
        torch.tensor(read_dump(dump).array("prefill", 0, "body.out.last_hidden_state")) @ head.T
        for dump in (real.folder.parent / "reference", real.folder)
    )
    assert found.low.sqnr == pytest.approx(sqnr(reference, actual), abs=0.3)


def test_the_command(checkpoint, capsys):
    ids = ",".join(map(str, IDS[0]))
    command = ["sensitivity", str(checkpoint), "--precision", "int4", "--ids", ids]
    assert main(command) == 0
    assert "model.layers.5" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 6
    assert found["units"] == []


@pytest.mark.parametrize(
    ("backend", "precision", "options", "said"),
    [
        ("onnxruntime", "fp16", {}, "onnxruntime has no precision 'fp16'. It has: int8, int4."),
        ("torch", "fp16", {}, "torch has no precision 'fp16'. It has: none."),
        ("qnn", "int3", {}, "qnn has no precision 'int3'"),
        ("onnxruntime", "int8", {"weights": "int4"}, "-O onnxruntime.weights=int4 is not int8"),
        ("onnxruntime", "int8", {"block": 3}, "no option 'block'"),
    ],
)
def test_a_precision_that_the_backend_lacks(checkpoint, backend, precision, options, said):
    chosen = VerifyOptions(backends={backend: options})
    with pytest.raises(UsageError, match=said.replace("(", "\\(")):
        measure_sensitivity(str(checkpoint), backend, precision, REQUEST, chosen)


def test_what_cannot_be_measured(checkpoint, capsys):
    assert main(["sensitivity", str(checkpoint), "--precision", "int8", "--dtype", "float16"]) == 4
    assert "measured against float32" in capsys.readouterr().err
    assert main(["sensitivity", str(checkpoint), "--precision", "int8", "--taps", "q"]) == 2
    assert "--taps q" in capsys.readouterr().err
    whole = replace(VerifyOptions(), kind="stub")
    with pytest.raises(UsageError, match="stub"):
        measure_sensitivity(str(checkpoint), "onnxruntime", "int8", REQUEST, whole)


def test_names():
    assert kind_of("model.layers.3.mlp.experts.7.w1") == "mlp.experts.*.w1"
    assert kind_of("model.layers.3:Add") == "Add"
    assert kind_of("lm_head") == "lm_head"
    assert layer_in("model.layers.13.mlp") == "model.layers.13"
    units = ["m.layers.1.q", "m.layers.1:Add", "m.layers.10.q", "m.layers.1.qk"]
    assert chosen_units(["m.layers.1", "m.layers.1.q"], units) == {
        "m.layers.1": {"m.layers.1.q", "m.layers.1:Add", "m.layers.1.qk"},
        "m.layers.1.q": {"m.layers.1.q"},
    }
