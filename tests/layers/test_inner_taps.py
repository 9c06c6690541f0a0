"""Taps inside attention and MLP are the outputs of the modules that transformers has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.layers.layer_lists import find_layer_list
from qeff_proxy.layers.taps import TappedPart, normalize_taps
from qeff_proxy.load.load_model import load_model
from qeff_proxy.parts import INNER_TAPS
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from torch import nn
from transformers import BertConfig, BertModel

IDS = torch.arange(5, 13)[None]
LLAMA = {tap: [f"self_attn.{tap}_proj"] for tap in "qkvo"} | {
    tap: [f"mlp.{tap}_proj"] for tap in ("gate", "up", "down")
}
#: Read from the modelling code: tap → paths in a layer.
MODULES: dict[str, dict[str, list[str]]] = {
    "llama": {**LLAMA, "norms": ["input_layernorm", "post_attention_layernorm"]},
    "qwen3": {
        **LLAMA,
        "norms": [
            "self_attn.q_norm",
            "self_attn.k_norm",
            "input_layernorm",
            "post_attention_layernorm",
        ],
    },
    "gpt2": {
        **{tap: ["attn.c_attn"] for tap in "qkv"},
        "o": ["attn.c_proj"],
        "norms": ["ln_1", "ln_2"],
        "gate": [],
        "up": ["mlp.c_fc"],
        "down": ["mlp.c_proj"],
    },
    "phi3": {
        **{tap: ["self_attn.qkv_proj"] for tap in "qkv"},
        "o": ["self_attn.o_proj"],
        "norms": ["input_layernorm", "post_attention_layernorm"],
        **{tap: ["mlp.gate_up_proj"] for tap in ("gate", "up")},
        "down": ["mlp.down_proj"],
    },
    "opt": {
        **{tap: [f"self_attn.{tap}_proj"] for tap in "qkv"},
        "o": ["self_attn.out_proj"],
        "norms": ["self_attn_layer_norm", "final_layer_norm"],
        "gate": [],
        "up": ["fc1"],
        "down": ["fc2"],
    },
    "bert": {
        "q": ["attention.self.query"],
        "k": ["attention.self.key"],
        "v": ["attention.self.value"],
        "o": ["attention.output.dense"],
        "norms": ["attention.output.LayerNorm", "output.LayerNorm"],
        "gate": [],
        "up": ["intermediate.dense"],
        "down": ["output.dense"],
    },
}


class AsPart(nn.Module):
    """A whole model as a part's module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.model(input_ids=input_ids)[0]}


@pytest.mark.parametrize("model_type", MODULES)
def test_a_tap_is_the_output_of_the_module_of_its_kind(model_type: str, make_model: Any) -> None:
    if model_type == "bert":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        model = BertModel(BertConfig(**sizes, vocab_size=131, num_hidden_layers=2)).eval()
    else:
        model = make_model(model_type)
    layers = find_layer_list(model, 2)
    assert layers is not None
    expected: dict[str, torch.Tensor] = {}
    for path in {path for paths in MODULES[model_type].values() for path in paths}:
        name = f"hidden_states.1.{path.replace('.', '_')}"
        layers.layers[1].get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, name=name: expected.update({name: output.clone()})
        )
    for tap in INNER_TAPS:
        with torch.no_grad():
            seen = TappedPart(AsPart(model), layers.layers, [tap])(input_ids=IDS)
        names = [f"hidden_states.1.{p.replace('.', '_')}" for p in MODULES[model_type][tap]]
        assert {name for name in seen if ".1." in name} == set(names), tap
        for name in names:
            assert torch.equal(seen[name], expected[name])


@pytest.fixture(scope="module")
def exported(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", layers=6).save_pretrained(folder / "checkpoint")
    hooks = Plugins.discover().hooks_for("llama")
    taps = "layers,v,norms,mlp.*_proj"
    loaded = load_model(str(folder / "checkpoint"))
    return export_model(loaded, hooks, output=folder / "export", taps=taps), hooks


def dump(exported: Any, backend: str, folder: Path, **options: Any) -> Path:
    export, hooks = exported
    run_compiled(
        compile_export(export, backend, CompileOptions(**options)),
        hooks,
        Request(inputs={"input_ids": IDS.numpy()}),
        settings={"max_new_tokens": 2, "do_sample": False},
        write_io=True,
        io_folder=folder,
    )
    return folder


def test_a_wrong_weight_is_found_by_its_module(exported: Any, tmp_path: Path) -> None:
    """The six layers are streamed, and the last ones copied from the first."""
    reference = dump(exported, "torch", tmp_path / "torch")
    assert compare_dumps(reference, dump(exported, "onnxruntime", tmp_path / "good")).passed
    assert read_dump(reference).array(
        "decode", 0, "body.out.hidden_states_mlp_gate_proj.layer-05"
    ).shape == (1, 1, 96)
    path = exported[0].folder / "body.onnx"
    whole = path.read_bytes()
    model = ir.load(path)
    weights = model.graph.initializers
    (name,) = (name for name in weights if name.endswith(".4.mlp.up_proj.weight"))
    weights[name].const_value = weights[name.replace("up", "gate")].const_value
    ir.save(model, path)
    try:
        bad = dump(exported, "onnxruntime", tmp_path / "bad", num_cores=1)  # compiled anew
    finally:
        path.write_bytes(whole)
    first = compare_dumps(reference, bad).first_divergence
    assert first is not None
    assert first.tensor == "body.out.hidden_states_mlp_up_proj.layer-04"


def test_what_is_no_tap_and_what_is_not_there(make_model: Any, exported: Any) -> None:
    assert normalize_taps("mlp.*,down,layers,mlp.*") == ("layers", "down", "mlp.*")
    for name in ("heads", "self attn.*", "a/b.*", "[q]*"):
        with pytest.raises(UsageError, match=r"no tap .*q, k, v, o, norms.*'self_attn\.\*'"):
            normalize_taps([name])
    _, hooks = exported
    loaded = load_model(str(exported[0].folder.parent / "checkpoint"))
    with pytest.raises(UnsupportedModelError, match=r"no mixer\.\* can be found .*LlamaDecoder"):
        export_model(loaded, hooks, taps="mixer.*")


def test_integers_are_not_tapped(make_model: Any) -> None:
    model = make_model("mixtral")
    layers = find_layer_list(model, 2)
    assert layers is not None
    with torch.no_grad():
        seen = TappedPart(AsPart(model), layers.layers, ["mlp.*"])(input_ids=IDS)
    assert all(tensor.is_floating_point() for tensor in seen.values())
    assert torch.isfinite(seen["hidden_states.0.mlp_gate"]).all()
