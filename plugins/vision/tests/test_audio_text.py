"""Models that take sounds in the place of tokens, against transformers' own generation.

Five layers of text and three of a tower with random weights.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from qeff_proxy import Plugins, QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq
from qeff_proxy.cli import main
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import CutError, UnsupportedModelError, UsageError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.load_model import flow_of, load_model, with_options, wrap_model
from qeff_proxy_vision.tiny import with_random_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

pytestmark = pytest.mark.one_home

FLOW = "audio-text-to-text"
NEW = 5
#: Tokens that differ say more.
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "repetition_penalty": 5.0,
}
AUDIO, VOCABULARY = "<|AUDIO|>", 99
AUDIO_TOKEN = VOCABULARY - 1
WORDS = ["<unk>", "<pad>", "<eos>", "<|audio_bos|>", "<|audio_eos|>"]
WORDS += ["USER:", "ASSISTANT:", *(f"w{i}" for i in range(AUDIO_TOKEN - 7)), AUDIO]
TEMPLATE = (
    "{% for message in messages %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'audio' %}<|AUDIO|> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
}
#: A window of one second, of 25 tokens.
WHISPER = {
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
}
QWEN = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
CONFIGS = {
    "qwen2_audio": {
        "audio_config": WHISPER,
        "text_config": {"model_type": "qwen2", **TEXT},
        "audio_token_index": AUDIO_TOKEN,
    },
    "voxtral": {
        "audio_config": {
            "num_mel_bins": 16,
            "max_source_positions": 48,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        "text_config": {"model_type": "llama", **TEXT},
        "audio_token_id": AUDIO_TOKEN,
    },
    "musicflamingo": {
        "audio_config": {
            "model_type": "musicflamingo_encoder",
            "num_mel_bins": 16,
            "max_source_positions": 48,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "text_config": {"model_type": "qwen2", **TEXT},
        "audio_token_id": AUDIO_TOKEN,
    },
    "qwen3_asr": {  # loops over the windows of a sound
        "audio_config": {**QWEN, "num_mel_bins": 16, "output_dim": 64, "downsample_hidden_size": 8},
        "text_config": {"model_type": "qwen3", **TEXT},
        "audio_token_id": AUDIO_TOKEN,
    },
    "gemma4": {  # takes any number of frames, and images
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "output_proj_dims": 48,
        },
        "text_config": {
            **TEXT,
            "sliding_window": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        "audio_token_id": AUDIO_TOKEN,
        "image_token_id": AUDIO_TOKEN - 1,
        "video_token_id": AUDIO_TOKEN - 2,
    },
}


def make_model(model_type):
    config = transformers.CONFIG_MAPPING[model_type](**CONFIGS[model_type])
    torch.manual_seed(0)
    kinds = transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForMultimodalLM
    model = kinds[model_type == "gemma4"].from_config(config)
    model.generation_config.eos_token_id = None
    return with_random_weights(model, 1.5)


def make_processor():
    """Qwen2-Audio's."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<|audio_bos|>", "<|audio_eos|>", AUDIO],
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return transformers.Qwen2AudioProcessor(extractor, fast, chat_template=TEMPLATE)


def noise(seconds, seed=0):
    samples = np.random.default_rng(seed).standard_normal(int(16_000 * seconds))
    return (0.2 * samples).astype(np.float32)


def cut(model, flow=FLOW, **options):
    hooks = Plugins.discover().hooks_for(model.config.model_type, task=flow)
    return cut_model(with_options(wrap_model(model), options), hooks, "split")


# --- What is learnt, and proven with two sounds, none, and padding ---

#: The part's inputs, its outputs, and the geometry that it is made for.
LEARNT = {
    "qwen2_audio": (
        {"input_features": ("sounds", 16, 100), "feature_attention_mask": ("sounds", 100)},
        {"audio_features": ("rows", 64), "audio_rows": ("rows",)},
        None,
    ),
    "voxtral": (
        {"input_features": ("sounds", 16, 96)},
        {"audio_features": ("rows", 64)},
        None,
    ),
    "qwen3_asr": (
        {"input_features": (1, 16, 200)},
        {"audio_features": (26, 64)},
        ["input_features_mask"],
    ),
}


@pytest.mark.parametrize("model_type", LEARNT)
def test_what_a_model_does_with_sounds_is_learnt(model_type):
    options = {"audio_frames": 200} if model_type == "qwen3_asr" else {}
    made = cut(make_model(model_type), **options)
    assert [part.name for part in made.proxy.parts] == ["audio", "embedding", "body", "lm_head"]
    assert made.report.max_difference <= 1e-5
    inputs, outputs, geometry = LEARNT[model_type]
    audio = made.proxy.part("audio")
    assert {spec.name: spec.shape for spec in audio.inputs} == inputs
    assert {spec.name: spec.shape for spec in audio.outputs} == outputs
    found = made.proxy.settings["sound"]["geometry"]
    assert (list(found["tensors"]) if found else None) == geometry


def test_images_and_sounds_of_one_model():
    made = cut(make_model("gemma4"), "image-text-to-text", image_size="32x64", audio_frames=96)
    names = [part.name for part in made.proxy.parts]
    assert names == ["vision", "audio", "embedding", "body", "lm_head"]
    assert made.report.max_difference <= 1e-5
    sample = made.proxy.sample()
    assert {"pixel_values", "input_features"} <= set(sample)
    assert made.proxy.settings["sound"]["pads"] is True
    # Both kinds matter: a fault in either is seen.
    for kind, token in (("image", AUDIO_TOKEN), ("sound", AUDIO_TOKEN - 1)):
        settings = {**made.proxy.settings[kind], "token_id": token}
        faulty = replace(made.proxy, settings={**made.proxy.settings, kind: settings})
        with pytest.raises((CutError, UsageError)):
            load_flow("image-text-to-text").verify(make_model("gemma4"), faulty, made.sites)


def test_features_of_another_sound_are_seen():
    model = make_model("qwen2_audio")
    made = cut(model)
    audio = made.proxy.part("audio")

    class Rolled(torch.nn.Module):
        def forward(self, **sounds):
            outputs = audio.module(**sounds)
            return {**outputs, "audio_features": outputs["audio_features"].roll(1, 0)}

    parts = [replace(p, module=Rolled()) if p is audio else p for p in made.proxy.parts]
    with pytest.raises(CutError, match="do not equal the uncut model"):
        load_flow(FLOW).verify(model, replace(made.proxy, parts=tuple(parts)), made.sites)


def test_times_begin_anew_only_with_a_sound_of_its_own():
    """Music Flamingo turns features by the time since the sound began, in an earlier window."""
    model = make_model("musicflamingo")
    made = cut(model)
    assert made.report.max_difference <= 1e-5
    sample = dict(made.proxy.sample())
    token = sample["input_ids"] == AUDIO_TOKEN
    gap = int(torch.diff(token[1].int(), dim=0).argmin()) + 1
    ids = sample["input_ids"].clone()  # the text between two sounds goes before them
    ids[1] = torch.cat([ids[1][gap : gap + 3], ids[1][:gap], ids[1][gap + 3 :]])
    together = replace(made.proxy, sample=lambda: {**sample, "input_ids": ids})
    with pytest.raises(CutError, match="1 run of sound tokens, and there are 2 windows"):
        load_flow(FLOW).verify(model, together, made.sites)


def test_what_is_not_served_is_refused_with_the_reason():
    model = make_model("voxtral")
    model.config.audio_token_id = None
    with pytest.raises(UnsupportedModelError, match="names no token of sounds"):
        cut(model)
    with pytest.raises(UsageError, match="audio_frames is 'long'"):
        cut(make_model("voxtral"), audio_frames="long")
    with pytest.raises(UsageError, match="kv_offload=False asks for one graph"):
        cut(make_model("voxtral"), kv_offload=False)


# --- A checkpoint with its processor ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2-audio")
    make_model("qwen2_audio").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def export(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("exports") / "split"
    face = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder, enable_proxy=True)
    face.export(target)
    return target


@pytest.fixture
def face(folder, export):
    made = QEFFAutoModelForSeq2SeqLM.from_pretrained(folder, enable_proxy=True)
    made.export(export)
    return made


def expected(folder, prompts, sounds):
    """What transformers generates from the processor's own inputs."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    given = {"audio": sounds, "sampling_rate": 16_000} if sounds else {}
    inputs = processor(text=prompts, return_tensors="pt", padding=True, **given)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = model.generate(**inputs, **GREEDY)
    return ids[:, inputs["input_ids"].shape[1] :].numpy()


CASES = {
    "one": ([f"w1 {AUDIO} w2"], [noise(0.9)]),
    "several": ([f"w1 {AUDIO} w2 {AUDIO} w3"], [noise(0.9), noise(0.4, 1)]),
    "none": (["w1 w2 w3"], []),
    "padded": ([f"{AUDIO} w2", f"w1 w4 {AUDIO} w2 {AUDIO}"], [noise(s, 2) for s in (0.7, 1, 0.3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case, face, folder):
    prompts, sounds = CASES[case]
    result = face.generate(prompts=prompts, audio=sounds, **GREEDY)
    wanted = expected(folder, prompts, sounds)
    assert len(np.unique(wanted)) > 2
    np.testing.assert_array_equal(result.generated_ids, wanted)


def test_the_commands_take_sounds(folder, export, tmp_path, capsys):
    sound = tmp_path / "speech.wav"
    soundfile.write(sound, noise(0.8), 16_000)
    dump = tmp_path / "io"
    given = ["--audio", str(sound), "--max-new-tokens", "3", "--json", "--io-dir", str(dump)]
    assert main(["generate", str(export), "w1 w2", *given]) == 0
    texts = json.loads(capsys.readouterr().out)["generated_texts"]
    written = read_dump(dump)
    assert written.array("prefill", 0, "audio.in.input_features").shape == (1, 16, 100)
    assert written.array("prefill", 0, "audio.out.audio_features").shape == (25, 64)
    # Without a prompt a sound is transcribed, by a prompt of its own.
    assert main(["generate", str(export), str(sound), "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated_texts"] != texts
    assert flow_of(load_model(str(folder))) == FLOW


BAD = {
    "too many tokens": ({"prompts": f"{AUDIO} {AUDIO}", "audio": noise(0.5)}, "2 sound tokens"),
    "too few tokens": ({"prompts": f"w1 {AUDIO}", "audio": [noise(0.5)] * 2}, "1 sound token"),
    "no sound": ({"prompts": f"w1 {AUDIO}"}, "no sound is given"),
    "empty": ({"prompts": "w1", "audio": np.zeros(0, np.float32)}, "holds no samples"),
    "silence": ({"prompts": "w1", "audio": np.zeros(9_000, np.float32)}, "only silence"),
    "NaN": ({"prompts": "w1", "audio": np.full(9_000, np.nan, np.float32)}, "NaN or infinite"),
    "no file": ({"prompts": "w1", "audio": "none.wav"}, "there is no sound file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sounds_are_refused_in_a_line(case, face):
    given, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        face.generate(**given)


def test_tensors_that_cannot_be_right_are_refused(face, folder):
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=f"w1 {AUDIO}", audio=noise(0.5), return_tensors="pt", sampling_rate=16_000
    )
    features = inputs["input_features"]
    changes = {
        "need 12": {"input_ids": inputs["input_ids"][:, 1:-1]},
        "the export takes": {"input_features": features[:, :, :50]},
        "NaN or infinite": {"input_features": features * torch.nan},
        "there is no sound": {"input_features": None, "feature_attention_mask": None},
    }
    for message, change in changes.items():
        given = {name: value for name, value in {**inputs, **change}.items() if value is not None}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        with pytest.raises(UsageError, match=message):
            face.generate(inputs=given)


def test_a_model_of_speech_takes_sounds_alone_and_beside_a_text(tmp_path):
    """Voxtral stands among the recognizers of speech; its processor needs another package."""
    folder = tmp_path / "voxtral"
    model = make_model("voxtral")
    model.save_pretrained(folder)
    face = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(folder, proxy="whole")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[AUDIO_TOKEN] * 12, 7, 8]]),
        "input_features": torch.randn(1, 16, 96, generator=generator),
    }
    result = face.generate(inputs=inputs, max_new_tokens=NEW)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    np.testing.assert_array_equal(result.generated_ids, ids[:, 16:].numpy())
