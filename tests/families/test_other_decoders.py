"""Decoders that keep an indexer's keys, loop over experts, or whose ends differ from most."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.families.experts import experts_in_turn
from qeff_proxy.flows.causal_engine import CausalEngine, StepId
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.testing import random_weights
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    DbrxConfig,
    DeepseekV32Config,
    MllamaForCausalLM,
    MllamaTextConfig,
    ModernBertDecoderConfig,
    MoshiConfig,
    RemBertConfig,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "deepseek_v32": lambda: DeepseekV32Config(
        **SIZES,
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
        **dict.fromkeys(("index_n_heads", "index_head_dim", "moe_intermediate_size"), 16),
        **dict.fromkeys(("n_routed_experts", "num_key_value_heads", "index_topk"), 4),
        **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
        qk_rope_head_dim=8,
        head_dim=8,
        num_experts_per_tok=2,
    ),
    "dbrx": lambda: DbrxConfig(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=5,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    # It scales its embeddings in place.
    "ctrl": lambda: CTRLConfig(vocab_size=96, n_embd=32, dff=48, n_layer=5, n_head=4),
    # The table, the hidden states and the head have a width each.
    "rembert": lambda: RemBertConfig(
        **SIZES, input_embedding_size=16, output_embedding_size=24, is_decoder=True
    ),
    # A window that reaches over all positions, beside a mask without one.
    "moshi": lambda: MoshiConfig(**SIZES, sliding_window=64, ffn_dim=48),
    # Of its five layers, one attends to images, of which a text has none.
    "mllama_text_model": lambda: MllamaTextConfig(
        **SIZES,
        cross_attention_layers=[2],
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # What it calls its decoder is its head.
    "modernbert-decoder": lambda: ModernBertDecoderConfig(
        **SIZES, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_the_parts_are_those_of_the_model(name):
    config = CONFIGS[name]()
    auto = (
        MllamaForCausalLM._from_config
        if name.startswith("mllama")
        else AutoModelForCausalLM.from_config
    )
    model = random_weights(auto(config, attn_implementation="eager"))
    hooks = Plugins.discover().hooks_for(config.model_type)
    parts = cut_model(wrap_model(model), hooks, "split").proxy.parts
    body = parts[1]
    caches = {spec.name.rsplit(".")[-1] for spec in body.inputs if "past_key" in spec.name}
    assert caches == {"key", "value"} | ({"indexer_key"} if name == "deepseek_v32" else set())
    engine = CausalEngine(parts, {part.name: TorchSession(part) for part in parts})
    ids = np.random.default_rng(0).integers(3, 96, (2, 11))
    pieces, cache = [], None
    for start, end in ((0, 7), (7, 10), (10, 11)):
        step = StepId("prefill", start)
        given, seen = ids[:, start:end].copy(), np.ones((2, end), np.int64)
        logits, cache = engine.step(step, given, seen, cache)
        pieces.append(logits)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    actual = np.concatenate(pieces, 1)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - expected[:, :1]).max() > 1e-2 * np.abs(expected).max()


def test_experts_that_all_run_give_what_the_chosen_ones_do():
    model = random_weights(AutoModelForCausalLM.from_config(CONFIGS["dbrx"]()))
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    layer = model.transformer.blocks[2].ffn
    every = experts_in_turn(layer)
    assert every is not layer
    assert every.experts is not layer.experts
    with torch.no_grad():
        torch.testing.assert_close(every(hidden), layer(hidden), rtol=1e-4, atol=1e-5)
        layer.experts.mlp.w1.zero_()  # the copy has the model's own weights
        torch.testing.assert_close(every(hidden), layer(hidden), rtol=1e-4, atol=1e-5)
