"""Checkpoints of all kinds of models: the first layers are run, the others' weights streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.export.check_graph import check_graph
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model, with_options
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.tiny import random_weights

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_LAYERS = 6


def whisper(encoder_layers: int = 4, decoder_layers: int = _LAYERS) -> Any:
    config = transformers.WhisperConfig(
        vocab_size=131,
        d_model=64,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=40,
        max_target_positions=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperForConditionalGeneration(config)


def llava() -> Any:
    text = transformers.LlamaConfig(vocab_size=131, num_hidden_layers=_LAYERS, **_SMALL)
    tower = transformers.CLIPVisionConfig(
        num_hidden_layers=4, image_size=28, patch_size=14, projection_dim=32, **_SMALL
    )
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "options", "traced"),
    [
        (whisper, {}, {"encoder": 2, "body": 1}),
        (lambda: whisper(_LAYERS, 2), {}, {"encoder": 1}),
        (llava, {}, {"vision": 1, "body": 1}),
        (llava, {"kv_offload": False}, {"body": 2}),
    ],
    ids=["whisper", "distilled", "llava", "llava in one graph"],
)
def test_all_layers_equal_pytorch(
    make: Any, options: dict[str, Any], traced: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    random_weights(model, 0)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = with_options(load_model(str(tmp_path / "checkpoint")), options)
    hooks = Plugins.discover().hooks_for(loaded.model_type)
    found = export_model(loaded, hooks, output=tmp_path / "out")
    assert found.cut["weights"].startswith("streamed from the checkpoint;")
    assert "since" not in found.cut["weights"]
    assert found.cut["traced_layers"] == traced
    assert (found.cut["layers"]["verified"], found.cut["layers"]["count"]) == (2, _LAYERS)
    whole = with_options(load_model(str(tmp_path / "checkpoint")), options)
    for part in cut_model(whole, hooks, "split", verify=False).proxy.parts:
        exported = found.part(part.name)
        assert [spec.name for spec in exported.outputs] == [spec.name for spec in part.outputs]
        assert check_graph(part, exported.inputs, found.folder / exported.file) is not None
