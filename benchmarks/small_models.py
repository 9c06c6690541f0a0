"""Small models of any architecture of transformers: five layers deep, with shaken random weights.

The sizes follow from the names that configs give them. What single architectures need besides
stands in `SETTINGS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FIRST_SPECIAL", "LAYERS", "VOCABULARY", "build_small"]

LAYERS, VOCABULARY = 5, 256
#: Tokens from here on may stand for images, padding and such.
FIRST_SPECIAL = 200
#: What configs call a size, by what is a small one.
SMALL: dict[int, str] = {
    LAYERS: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth "
    "num_encoder_layers num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers",
    VOCABULARY: "vocab_size",
    64: "hidden_size n_embd d_model dim embedding_size emb_dim word_embed_proj_dim model_dim "
    "output_hidden_size true_hidden_size intra_bottleneck_size lru_width proj_hidden_size "
    "embed_dim embedding_dim out_hidden_size projection_dim text_hidden_size output_dim "
    "cross_attention_hidden_size mm_hidden_size vision_hidden_size projector_hidden_size "
    "encoder_hidden_size",
    96: "intermediate_size ffn_dim n_inner d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim "
    "ffn_hidden_size intermediate_size_mlp block_ff_dim encoder_intermediate_size "
    "shared_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size image_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads n_routed_experts "
    "decoder_attention_heads attention_heads num_local_experts num_experts linear_num_value_heads "
    "linear_num_heads mamba_n_heads moe_num_experts encoder_num_attention_heads "
    "decoder_num_attention_heads num_image_tokens mm_tokens_per_image swa_num_attention_heads "
    "index_topk",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "linear_num_key_heads encoder_num_key_value_heads decoder_num_key_value_heads top_k_experts "
    "swa_num_key_value_heads",
    # Fewer heads of an indexer give some positions the same score, of which any may be chosen.
    16: "index_n_heads head_dim v_head_dim qk_nope_head_dim d_kv kv_lora_rank state_size "
    "query_pre_attn_scalar linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
    "mamba_d_state swa_head_dim swa_v_head_dim global_head_dim index_head_dim",
    8: "qk_rope_head_dim rotary_dim sliding_window attention_window_size local_attention "
    "patch_size attention_chunk_size",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_expert_group n_groups expand "
    "mamba_expand",
    512: "max_position_embeddings n_positions max_seq_len max_target_positions",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
_RECURRENT = ["linear_attention", "full_attention"]
_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_KINDS = ("full_attention", "sliding_attention")
_ROPE_OF_KINDS = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in _KINDS}
_SECTIONED = {"text_config": {"rope_parameters": _SECTIONS}}
_NO_TOKEN_IDS = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}  # refused with them
_PLACED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
#: What the defaults of a config leave out, or have otherwise than the checkpoints.
SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_OF_KINDS}},
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251, "<|visual token 0|>": 252}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 250},
    "falcon_h1": {"mamba_d_ssm": 64},
    "funnel": {"block_sizes": [2, 2, 1], "block_repeats": [1, 1, 1]},
    "gemma3n_text": _NO_TOKEN_IDS,
    "gemma4": {
        "text_config": {**_NO_TOKEN_IDS, "max_position_embeddings": 2048},
        "vision_config": _PLACED,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                **_SECTIONS,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "granitemoehybrid": {"layer_types": _RECURRENT * 2 + _RECURRENT[:1]},
    "internvl": {"image_seq_length": 4, "downsample_ratio": 0.5},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": _RECURRENT * 2 + _RECURRENT[:1]},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        "full_attn_idxs": None,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "lilt": {"hidden_size": 96},  # of six coordinates
    "longformer": {"attention_window": [8] * LAYERS, "max_position_embeddings": 512},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32], [32, 64], [64, 64]]},
    "mobilebert": {"num_feedforward_networks": 1},  # without norms, rounding grows
    "moonshine": dict.fromkeys(
        ("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4
    ),
    "moonshine_streaming": {"num_key_value_heads": 4},
    "pop2piano": {"decoder_start_token_id": 0},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
SETTINGS |= {
    "cohere_compass_text": {"rope_parameters": _ROPE_OF_KINDS},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8}},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4, **_ROUTED},
    "dots1": {"n_shared_experts": 1, **_ROUTED},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "moshi": {"sliding_window": 512},  # as long as its positions
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
}
_CROSS = {
    "decoder": {"is_decoder": True, "add_cross_attention": True, "hidden_size": 32},
    "decoder_start_token_id": 2,
}
SETTINGS |= dict.fromkeys(("encoder-decoder", "speech-encoder-decoder"), _CROSS)
_HEADS = {
    8: "axk1 deepseek_v3 youtu",
    16: "hunyuan_v1_dense hunyuan_v1_moe ministral",
}
SETTINGS |= {name: {"head_dim": size} for size, names in _HEADS.items() for name in names.split()}
SETTINGS |= dict.fromkeys(
    [
        "qwen2_vl",
        "qwen2_5_vl",
        "glm4v",
        "glm46v",
        "glm_ocr",
        "glmga",
        "paddleocr_vl",
        "cosmos3_edge",
    ],
    _SECTIONED,
)
SETTINGS |= {
    "chameleon": {
        "vocabulary_map": {
            "<image>": 250,
            **{f"IMGIMG{'ABCDEFGH'[n]}Z": 230 + n for n in range(8)},
        },
        "vq_config": {
            "num_embeddings": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 2],
            "num_res_blocks": 1,
            "latent_channels": 64,
        },
    },
    "fuyu": {"image_size": 32},
    "gemma4_unified": {
        "text_config": _NO_TOKEN_IDS,
        "vision_config": {
            "mm_embed_dim": 64,
            "output_proj_dims": 64,
            "mm_posemb_size": 64,
            "patch_size": 8,
            "pooling_kernel_size": 2,
        },
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "inkling_mm_model": {"vision_config": {"text_hidden_size": 64}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "muse_glimmer": {"out_hidden_size": 256, "vision_config": {"image_size": 32}},
    "qianfan_ocr": {"vision_config": {"image_size": [32, 32]}},
    "vipllava": {"vision_feature_layer": [-2, -3, 1]},
}
_SWITCHED = [
    {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section}
    for section in ([3, 3, 2], [2, 2, 2, 2])
]
_THINKER = {
    **_SECTIONED,
    **{
        f"{of}_{end}_token_id": 240 + 2 * a + b
        for a, of in enumerate(("vision", "audio"))
        for b, end in enumerate(("start", "end"))
    },
}
_INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
SETTINGS |= {
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", *["sparse"] * 4],
            "num_experts_per_tok": 2,
        },
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "head_dim": 24},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_output_size": 64},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _SWITCHED[0]}},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "index_topk": 8,
            "index_kpool": 4,
        }
    },
    "granite4_vision": {
        "deepstack_layer_map": [[1, 1]],
        "spatial_target_layers": [0, 2, 3, 4],
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        "downsample_rate": "2/4",
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "num_key_value_heads": 2,
            "rope_parameters": _SWITCHED[1],
        },
        "vision_config": {"num_key_value_heads": 4},
    },
    "kimi_k25": {
        "text_config": {"head_dim": 8, "num_key_value_heads": 4},
        "projection_hidden_size": 64,
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}, "out_hidden_size": 256},
    "nemotron_h_omni": {
        "img_context_token_id": 250,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "unlimited_ocr": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
}
_NAMED = {"image_token_id": 250, "video_token_id": 249, "insert_layer_id": 2}
SETTINGS |= dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _NAMED)
#: Models that take sounds: a short window, and a width of the tower that the projector joins.
_WINDOW = {"max_source_positions": 60}
SETTINGS |= {
    "audioflamingo3": {"audio_config": _WINDOW},
    "fun_asr_nano": {
        "adaptor_config": {"intermediate_size": 16},
        "audio_config": {"num_timestamp_prediction_layers": 1},
    },
    "glmasr": {"audio_config": {"intermediate_size": 256}},
    "granite_speech": {"encoder_config": {"hidden_dim": 64}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64}},
    "moss_transcribe_diarize": {"audio_config": _WINDOW},
    "musicflamingo": {"audio_config": _WINDOW},
    "qwen2_audio": {"audio_config": _WINDOW},
    "qwen2_5_omni_thinker": {**_THINKER, "audio_config": _WINDOW},
    "qwen3_omni_moe_thinker": {
        **_THINKER,
        "audio_config": {**_WINDOW, "downsample_hidden_size": 32},
    },
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 32}},
    "qwen3_omni_moe": {
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 32},
        }
    },
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}
    },
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config": {"num_filters": 4, "depths": [1] * 7}
        for kind in ("acoustic", "semantic")
    },
    "voxtral": {"audio_config": {**_WINDOW, "intermediate_size": 256}, "audio_token_id": 250},
}
SETTINGS["gemma4"]["audio_config"] = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "output_proj_dims": 64,
}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "linear_num_key_heads")
#: What is left out of the sizes, or has another one, where a model of all of them cannot be built:
#: first the shapes of heads, then widths.
ATTEMPTS: tuple[dict[str, int | None], ...] = (
    {},
    dict.fromkeys(_KV_HEADS, 4),
    {**dict.fromkeys(_KV_HEADS), "head_dim": None},
    {name: None for name, size in SIZES.items() if size not in (LAYERS, VOCABULARY)},
)
MOST_PARAMETERS = 2.5e8


def small_settings(config: Any, sizes: Mapping[str, int], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that make its model small; those of `own` are what they are."""
    settings: dict[str, Any] = {}
    depth = getattr(config, "num_hidden_layers", None)
    special = VOCABULARY  # each special token is another one
    for name in config.to_dict():
        value = vars(config)[name] if name in vars(config) else getattr(config, name, None)
        if hasattr(value, "to_dict"):
            settings[name] = type(value)(**small_settings(value, sizes, own.get(name, {})))
        elif name in sizes and type(value) is int:
            settings[name] = sizes[name]
        elif isinstance(value, list) and len(value) == depth and depth > LAYERS:
            kinds = list(dict.fromkeys(map(str, value)))
            few = [value[[str(v) for v in value].index(kind)] for kind in kinds]
            settings[name] = (few * LAYERS)[:LAYERS]
        elif (
            name.endswith(("token_id", "token_index"))
            and type(value) is int
            and value >= FIRST_SPECIAL
        ):
            special -= 1
            settings[name] = special
    return {
        **settings,
        **{k: v for k, v in own.items() if k not in settings or not isinstance(v, dict)},
    }


def build_small(
    model_type: str,
    auto_class: Any,
    works: Callable[[Any], Any],
    *,
    decoder: bool = False,
) -> tuple[Any, Any]:
    """Build a small model that works.

    Args:
        model_type: The key of the config.
        auto_class: A class of transformers that makes models from configs.
        works: Runs a model; its errors mean that the sizes do not fit each other.
        decoder: The model is to be a decoder, where its config leaves that open.

    Returns:
        The model and what `works` returned.
    """
    import torch
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    first: Exception | None = None  # the others may be about sizes alone
    for attempt in ATTEMPTS:
        try:
            sizes = {name: s for name, s in {**SIZES, **attempt}.items() if s is not None}
            own = SETTINGS.get(model_type, {})
            config = config_class(**small_settings(config_class(), sizes, own))
            config.architectures = config.architectures or []  # some types have several classes
            if decoder and hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                size = auto_class.from_config(copy.deepcopy(config)).num_parameters()
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters are too many")
            model = auto_class.from_config(config, attn_implementation="eager").eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    parameter.add_(noise * (0.1 if parameter.dim() < 2 else 0.15))
            return model, works(model)
        except Exception as error:  # noqa: BLE001 (raised after the last attempt)
            first = first or error
            if attempt is ATTEMPTS[-1]:
                raise first from None
    raise AssertionError("the last attempt returns or raises")
