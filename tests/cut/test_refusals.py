"""What cannot be cut is refused with what is the matter, and what only looks so is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing import random_weights, tiny_config


def cut(loaded, kind="split"):
    return cut_model(loaded, Plugins.discover().hooks_for(loaded.model_type), kind)


def test_a_model_with_another_cache_is_refused_by_what_it_caches() -> None:
    """It compresses keys into the cache."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("deepseek_v4"))
    said = "caches something else than keys, values and states .*compressed_kv.*(HCA)"
    with pytest.raises(UnsupportedModelError, match=said):
        cut(wrap_model(model))


@pytest.mark.parametrize("kind", ["split", "whole"])
def test_a_classifier_is_named(kind: str) -> None:
    model = transformers.LlamaForSequenceClassification(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError) as error:
        cut(wrap_model(model), kind)
    assert "LM head of LlamaForSequenceClassification" in str(error.value)
    assert "classifier's, are not cut" in str(error.value)


def test_a_decoder_that_calls_itself_its_decoder_is_cut() -> None:
    """Llama 4's text model; the oracle is the uncut model, which the cut is compared with."""
    kinds = {"layer_types": None, "no_rope_layers": None, "moe_layers": None}
    config = tiny_config("llama4_text", num_hidden_layers=5, attention_chunk_size=6, **kinds)
    model = random_weights(transformers.Llama4ForCausalLM(config))
    assert model.get_decoder() is model
    assert cut(wrap_model(model)).report is not None


@pytest.mark.parametrize(
    ("kind", "model_type"), [("LlamaForCausalLM", "llama"), ("BertModel", "bert")]
)
def test_a_config_without_return_dict_changes_nothing(
    kind: str, model_type: str, tmp_path: Path
) -> None:
    """The oracle is the uncut model in transformers, which the cut is compared with."""
    config = tiny_config(model_type, return_dict=False)
    random_weights(getattr(transformers, kind)(config)).save_pretrained(tmp_path)
    assert '"return_dict": false' in (tmp_path / "config.json").read_text()
    report = cut(load_model(str(tmp_path))).report
    assert report is not None
    assert report.largest_value > 0
