"""Exports do without each private name of another library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from qeff_proxy.common import private_names
from qeff_proxy.common.private_names import (
    DECOMPOSING,
    FOLDING,
    OPERATOR_TABLE,
    TRACING,
    build_model,
    find,
    matched_operator,
    model_classes,
    operators,
)
from qeff_proxy.export.export_model import export_model
from qeff_proxy.export.trace.decompose_in_place import lowered_in_place
from qeff_proxy.export.trace.operator_table import operators_read_once
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.load.tasks import TASKS
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.tiny import random_weights
from torch.onnx._internal.exporter import _core
from torch.onnx._internal.exporter._registration import ONNXRegistry

GROUPS = {
    "decomposing": DECOMPOSING,
    "operator table": OPERATOR_TABLE,
    "folding": FOLDING,
    "tracing": TRACING,
}
NAMES = [(group, name) for group, names in GROUPS.items() for name in names]
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_LAYERS = {"num_hidden_layers": 1}


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=131, n_embd=32, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(vocab_size=131, **_SMALL, **_LAYERS)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=131, **_SMALL, **_LAYERS))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=131,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=40,
        max_target_positions=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperForConditionalGeneration(config)


def llava() -> Any:
    text = transformers.LlamaConfig(vocab_size=131, **_SMALL, **_LAYERS)
    tower = transformers.CLIPVisionConfig(
        image_size=28, patch_size=14, projection_dim=32, **_SMALL, num_hidden_layers=2
    )
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5)
    return transformers.LlavaForConditionalGeneration(config)


def export(make: Any, folder: Any) -> Any:
    """An export of a model; ONNX Runtime's results are compared with PyTorch's."""
    torch.manual_seed(0)
    model = make().eval()
    random_weights(model, 0)
    hooks = Plugins.discover().hooks_for(model.config.model_type)
    return export_model(wrap_model(model), hooks, output=folder)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ": ".join(name))
def test_a_group_without_one_of_its_names_is_not_used(
    name: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = GROUPS[name[0]]
    assert find(group) is not None
    module = group[name[1]].partition(":")[0]
    for missing in (f"{module}:renamed", f"{module}_renamed"):
        monkeypatch.setitem(group, name[1], missing)
        assert find(group) is None


@pytest.mark.parametrize("make", [gpt2, llama, bert, whisper, llava])
def test_models_are_exported_without_any_private_name(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for group in GROUPS.values():
        monkeypatch.setitem(group, next(iter(group)), "torch:renamed")
    prepare, table = _core._prepare_exported_program_for_export, ONNXRegistry.from_torchlib
    with lowered_in_place() as lowering, operators_read_once():
        assert _core._prepare_exported_program_for_export is prepare
        assert ONNXRegistry.from_torchlib == table
    assert not lowering.begun
    differences = export(make, tmp_path / "out").cut["graphs"]
    assert differences


@pytest.mark.parametrize(
    ("group", "name"),
    [(DECOMPOSING, "promotion_rule"), (DECOMPOSING, "implemented"), (OPERATOR_TABLE, "register")],
)
def test_a_model_is_exported_where_a_name_means_something_else(
    group: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from qeff_proxy.export.trace import operator_table

    operator_table._table.cache_clear()
    monkeypatch.setitem(group, name, "builtins:NotImplemented")
    export(gpt2, tmp_path / "out")
    operator_table._table.cache_clear()


def test_a_rule_whose_pattern_is_unknown_is_tried_on_every_node() -> None:
    assert matched_operator(object()) is None


def test_an_operator_that_pytorch_lacks_is_left_out() -> None:
    relu = torch.ops.aten.relu.default
    assert operators(["relu.default", "renamed.default", "relu.renamed"]) == {relu}


@pytest.mark.parametrize("auto_class", sorted({task.auto_class for task in TASKS.values()}))
def test_an_auto_class_has_a_public_mapping(
    auto_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = model_classes(auto_class)
    cls = getattr(transformers, auto_class)
    monkeypatch.setattr(private_names, "getattr", _without("_model_mapping"), raising=False)
    assert cls._model_mapping is private
    assert model_classes(auto_class) is private


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_built_by_its_constructor(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(vocab_size=131, **_SMALL, **_LAYERS)
    before = torch.get_default_dtype()
    expected = build_model(transformers.LlamaForCausalLM, config, dtype)
    monkeypatch.setattr(private_names, "getattr", _without("_from_config"), raising=False)
    model = build_model(transformers.LlamaForCausalLM, config, dtype)
    assert torch.get_default_dtype() == before
    assert model.config._attn_implementation == expected.config._attn_implementation == "eager"
    assert dtypes_of(model) == dtypes_of(expected)


def dtypes_of(model: Any) -> dict[str, torch.dtype]:
    return {
        name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _without(missing: str) -> Any:
    """``getattr``, of objects that have no such attribute."""

    def look_up(owner: Any, name: str, *default: Any) -> Any:
        return getattr(owner, "renamed" if name == missing else name, *default)

    return look_up
