"""Encoder-decoders whose decoders differ from most, on ONNX Runtime, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForSeq2SeqLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UsageError
from qeff_proxy.testing import random_weights
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    FSMTConfig,
    LEDConfig,
    RobertaConfig,
    SwitchTransformersConfig,
    T5Gemma2Config,
)

VOCABULARY, NEW = 99, 8
SAME = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
GEMMA = {
    **SAME,
    "hidden_size": 32,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,  # even: one more key after a query than before it
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "eos", "bos"))},
}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 5), ("attention_heads", 4), ("ffn_dim", 48))
}
CONFIGS = {
    # A decoder of another family and another width, with the head in it.
    "encoder-decoder": lambda: EncoderDecoderConfig(
        encoder=RobertaConfig(**SAME, hidden_size=48).to_dict(),
        decoder=BertConfig(
            **SAME, hidden_size=32, is_decoder=True, add_cross_attention=True
        ).to_dict(),
        decoder_start_token_id=2,
        pad_token_id=0,
    ),
    # Its keys of the encoder's hidden states are normalized, and attended to with its own.
    "t5gemma2": lambda: T5Gemma2Config(
        encoder={
            "text_config": GEMMA,
            "vision_config": {**IMAGE, "patch_size": 16, "intermediate_size": 32},
            "mm_tokens_per_image": 4,
            "image_token_index": 98,
        },
        decoder=GEMMA,
        image_token_index=98,
        eoi_token_index=97,
        decoder_start_token_id=2,
    ),
    # Encoder and decoder are no models of their own, of different vocabularies.
    "fsmt": lambda: FSMTConfig(
        **SIDES,
        d_model=32,
        langs=["en", "de"],
        src_vocab_size=VOCABULARY,
        tgt_vocab_size=90,
        max_position_embeddings=40,
        tie_word_embeddings=False,
    ),
    # Its encoder attends to windows, in blocks.
    "led": lambda: LEDConfig(
        **SIDES,
        vocab_size=VOCABULARY,
        d_model=32,
        max_encoder_position_embeddings=40,
        max_decoder_position_embeddings=40,
        attention_window=4,
    ),
    # An expert takes so many tokens of a text, and leaves out those that follow.
    "switch_transformers": lambda: SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=5,
        num_sparse_encoder_layers=2,
        num_decoder_layers=5,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=3,
        expert_capacity=8,
        decoder_start_token_id=0,
    ),
}
LENGTHS = {"switch_transformers": 36}
STREAMED = ("fsmt", "led")


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_logits_are_those_of_transformers(name, tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[name](), attn_implementation="eager")
    model = random_weights(model, 1)
    pad = model.config.get_text_config(decoder=True).pad_token_id
    model.generation_config.update(eos_token_id=None, pad_token_id=pad, forced_eos_token_id=None)
    model.generation_config.update(num_beams=1, max_length=None)  # FSMT's own: 5 beams
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    proxy = QEFFAutoModelForSeq2SeqLM(model, proxy="split")
    if name in STREAMED:
        model.save_pretrained(tmp_path / "checkpoint")
        proxy = QEFFAutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / "checkpoint", enable_proxy=True
        )
    export = read_export(proxy.export(tmp_path / "export"))
    ids = np.random.default_rng(1).integers(3, 96, (2, LENGTHS.get(name, 9)))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = pad, 0
    texts = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        wanted = model.generate(
            **{key: torch.from_numpy(value) for key, value in texts.items()},
            max_new_tokens=NEW,
            no_repeat_ngram_size=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens, logits = wanted.sequences[:, 1:].numpy(), torch.stack(wanted.logits, 1).numpy()
    assert len(np.unique(tokens)) > 5, "tokens that are all alike prove nothing"
    result = proxy.generate(
        inputs=texts, generation_len=NEW, no_repeat_ngram_size=1, io_dir=tmp_path / "io"
    )
    np.testing.assert_array_equal(result.generated_ids, tokens)
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(NEW - 1))]
    actual = [dump.array(*step, "lm_head.out.logits")[:, -1] for step in steps]
    assert np.abs(np.stack(actual, 1) - logits).max() < 1e-4 * np.abs(logits).max()
    kinds = {mask.kind for part in export.parts for mask in part.masks if part.name == "encoder"}
    assert ("bidirectional_window" in kinds) == (name == "t5gemma2")
    if name == "led":
        with pytest.raises(UsageError, match="global_attention_mask"):
            proxy.generate(inputs={**texts, "global_attention_mask": mask})
    if name == "fsmt":
        with pytest.raises(UsageError, match="decoder_input_ids has padding"):
            proxy.generate(inputs={**texts, "decoder_input_ids": np.array([[2, pad]] * 2)})
        others = [token for token in range(VOCABULARY) if token not in (pad, 5, 6, 7)]
        with pytest.warns(UserWarning, match="generated padding tokens"):
            proxy.generate(
                inputs=texts, generation_len=4, no_repeat_ngram_size=1, suppress_tokens=others
            )
