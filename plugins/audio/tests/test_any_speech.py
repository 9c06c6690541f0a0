"""Recognizers with an encoder and a decoder but Whisper, against transformers' own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.request import Request
from qeff_proxy.testing import random_weights
from qeff_proxy_audio import any_speech, pop2piano
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    DiaConfig,
    DiaForConditionalGeneration,
    GenerationConfig,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    MoonshineStreamingConfig,
    MoonshineStreamingForConditionalGeneration,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
    Speech2TextConfig,
    SpeechEncoderDecoderConfig,
    Wav2Vec2Config,
)

NEW = 8
SIZES = {
    "vocab_size": 77,
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_num_hidden_layers": 5,
    "decoder_num_hidden_layers": 6,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "max_position_embeddings": 60,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}
SAME = {
    "vocab_size": 77,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 60,
}


@pytest.fixture(scope="module")
def moonshine(tmp_path_factory):
    model = random_weights(MoonshineForConditionalGeneration(MoonshineConfig(**SIZES)))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("moonshine")
    model.save_pretrained(folder)
    proxy = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(folder, enable_proxy=True)
    return model.eval(), proxy, proxy.export(folder / "export")


def sounds():
    """Two sounds of different length, padded at the end."""
    values = np.random.default_rng(3).standard_normal((2, 7_000)).astype(np.float32)
    mask = np.ones((2, 7_000), np.int64)
    values[1, 5_300:], mask[1, 5_300:] = 0, 0
    return {"input_values": values, "attention_mask": mask}


def test_each_sound_gives_the_tokens_of_transformers(moonshine):
    model, proxy, _ = moonshine
    expected = []
    for length, row in zip((7_000, 5_300), sounds()["input_values"], strict=True):
        sound = torch.from_numpy(row[None, :length])
        with torch.no_grad():
            expected.append(model.generate(sound, max_new_tokens=NEW, no_repeat_ngram_size=1)[0])
    result = proxy.generate(inputs=sounds(), max_new_tokens=NEW, no_repeat_ngram_size=1)
    wanted = torch.stack(expected)[:, 1:].numpy()
    assert len(np.unique(wanted)) > 5
    np.testing.assert_array_equal(result.generated_ids, wanted)


def test_the_logits_of_each_step_are_those_of_one_pass(moonshine, tmp_path):
    model, proxy, _ = moonshine
    sound = sounds()["input_values"][:1]
    result = proxy.generate(
        inputs={"input_values": sound}, max_new_tokens=NEW, io_dir=tmp_path / "io"
    )
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(NEW - 1))]
    actual = np.concatenate([dump.array(*step, "lm_head.out.logits") for step in steps], axis=1)
    ids = np.concatenate([[[1]], result.generated_ids[:, :-1]], axis=1)
    with torch.no_grad():
        outputs = model(torch.from_numpy(sound), decoder_input_ids=torch.from_numpy(ids))
    wanted = outputs.logits.numpy()
    assert np.abs(actual - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_its_layers_are_streamed(moonshine):
    cut = read_export(moonshine[2]).cut
    assert cut["weights"].startswith("streamed from the checkpoint; BLAKE3")
    assert cut["sites"]["embedding"]["module"] == "model.decoder.embed_tokens"


def test_a_dump_is_of_one_sound(moonshine, tmp_path):
    with pytest.raises(UsageError, match="2 sounds run one after another"):
        moonshine[1].generate(inputs=sounds(), max_new_tokens=2, io_dir=tmp_path / "io")


CONFIGS = {
    # Its decoder counts positions from token ids.
    "speech_to_text": lambda: Speech2TextConfig(
        vocab_size=77,
        d_model=32,
        encoder_layers=5,
        decoder_layers=6,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        conv_channels=32,
        max_target_positions=60,
        max_source_positions=200,
    ),
    # A decoder of another family and another width, with the head in it.
    "speech-encoder-decoder": lambda: SpeechEncoderDecoderConfig(
        encoder=Wav2Vec2Config(
            **SAME,
            hidden_size=48,
            conv_dim=(16, 16),
            conv_stride=(10, 8),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ).to_dict(),
        decoder=BertConfig(
            **SAME, hidden_size=32, is_decoder=True, add_cross_attention=True
        ).to_dict(),
        decoder_start_token_id=2,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_decoders_give_the_tokens_and_logits_of_transformers(name, tmp_path):
    config = CONFIGS[name]()
    auto = AutoModelForSpeechSeq2Seq.from_config(config, attn_implementation="eager")
    model = random_weights(auto, seed=4)
    proxy = QEFFAutoModelForSpeechSeq2Seq(model, proxy="split")
    proxy.export(tmp_path / "export")
    entry = "input_features" if name == "speech_to_text" else "input_values"
    shape = (1, 130, 80) if name == "speech_to_text" else (1, 5_300)
    sound = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    settings = {"max_new_tokens": NEW, "no_repeat_ngram_size": 1}
    with torch.no_grad():
        wanted = model.generate(
            **{entry: torch.from_numpy(sound)},
            **settings,
            output_logits=True,
            return_dict_in_generate=True,
        )
    result = proxy.generate(inputs={entry: sound}, io_dir=tmp_path / "io", **settings)
    tokens = wanted.sequences[:, 1:].numpy()
    assert len(np.unique(tokens)) > 5
    np.testing.assert_array_equal(result.generated_ids, tokens)
    dump = read_dump(result.io_folder)
    steps = [("prefill", 0), *(("decode", index) for index in range(tokens.shape[1] - 1))]
    actual = np.concatenate([dump.array(*step, "lm_head.out.logits") for step in steps], axis=1)
    logits = torch.stack(wanted.logits, 1).numpy()
    assert np.abs(actual - logits).max() < 1e-4 * np.abs(logits).max()


def test_windows_that_a_mask_switches_on(tmp_path):
    """Moonshine's streaming encoder; it takes blocks of 80 samples, and masks one that is cut."""
    sizes = {key: SAME[key] for key in SAME if key not in ("vocab_size", "max_position_embeddings")}
    windows = [[8, 3], [8, 0], [5, 2], [8, 3], [8, 0]]
    config = MoonshineStreamingConfig(
        **SAME,
        hidden_size=32,
        num_key_value_heads=4,
        decoder_start_token_id=1,
        encoder_config={
            **sizes,
            "hidden_size": 32,
            "num_key_value_heads": 4,
            "sliding_windows": windows,
        },
    )
    model = random_weights(MoonshineStreamingForConditionalGeneration(config), seed=4).eval()
    model.save_pretrained(tmp_path)
    proxy = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, enable_proxy=True)
    assert read_export(proxy.export()).cut["weights"].startswith("streamed")
    sound = np.zeros((1, 5_360), np.float32)
    sound[:, :5_297] = np.random.default_rng(3).standard_normal((1, 5_297))
    mask = (np.arange(5_360) < 5_297).astype(np.int64)[None]
    given = {"input_values": torch.from_numpy(sound), "attention_mask": torch.from_numpy(mask)}
    settings = {"max_new_tokens": NEW, "no_repeat_ngram_size": 1}
    with torch.no_grad():
        wanted = model.generate(**given, **settings)[:, 1:].numpy()
        unmasked = model.generate(given["input_values"], **settings)[:, 1:].numpy()
    result = proxy.generate(inputs={"input_values": sound[:, :5_297]}, **settings)
    np.testing.assert_array_equal(result.generated_ids, wanted)
    assert len(np.unique(wanted)) > 4
    assert not np.array_equal(unmasked, wanted)


def test_music_in_the_style_of_a_composer(tmp_path):
    """Its encoder runs on spectra behind a row that transformers' ``generate`` puts there."""
    config = Pop2PianoConfig(
        vocab_size=77,
        composer_vocab_size=3,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=5,
        num_decoder_layers=5,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = random_weights(Pop2PianoForConditionalGeneration(config), seed=4).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no composer_to_feature_token"):
        QEFFAutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, enable_proxy=True).export()
    tokens = {f"composer{n + 1}": 60 + n for n in range(3)}
    model.generation_config = GenerationConfig(
        composer_to_feature_token=tokens, decoder_start_token_id=0, pad_token_id=0
    )
    model.save_pretrained(tmp_path)

    def proxy_of(**options):
        return QEFFAutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, enable_proxy=True, **options)

    with pytest.raises(UsageError, match="Give one of composer1, composer2, composer3"):
        proxy_of(composer="bach").export()
    proxy = proxy_of(composer="composer2")
    assert read_export(proxy.export()).cut["weights"].startswith("streamed")
    spectra = np.random.default_rng(3).standard_normal((2, 30, 32)).astype(np.float32)
    mask = np.ones((2, 30), np.int64)
    spectra[1, 22:], mask[1, 22:] = 0, 0
    given = {"input_features": spectra, "attention_mask": mask}
    settings = {"max_new_tokens": NEW, "no_repeat_ngram_size": 1}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
    wanted, other = (
        model.generate(**tensors, composer=composer, **settings)[:, 1:].numpy()
        for composer in ("composer2", "composer1")
    )
    result = proxy.generate(inputs=given, **settings)
    np.testing.assert_array_equal(result.generated_ids, wanted)
    assert len(np.unique(wanted)) > 5
    assert not np.array_equal(wanted, other)
    with pytest.raises(UsageError, match="divided by their beats"):
        pop2piano.preprocess(None, Request(audio=(spectra[0, :, 0],)))


def test_a_model_that_speaks_is_refused():
    with torch.device("meta"):
        model = DiaForConditionalGeneration(DiaConfig())
    with pytest.raises(UnsupportedModelError, match="takes input_ids, and no sound"):
        any_speech.locate_embedding(model)
