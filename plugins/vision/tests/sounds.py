"""Tiny checkpoints of models that take sounds, with random weights and their processors."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from qeff_proxy_vision.tiny import with_random_weights
from tokenizers import Tokenizer, models, pre_tokenizers

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
    model = transformers.AutoModelForMultimodalLM.from_config(config)
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
