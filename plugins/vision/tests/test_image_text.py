"""Models that no plugin is written for, cut by what they say of themselves.

Five layers of text and three of a tower with random weights, against transformers' generation.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from qeff_proxy import Plugins
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import CutError, UnsupportedModelError, UsageError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.load_model import with_options, wrap_model
from qeff_proxy_vision.tiny import with_random_weights

pytestmark = pytest.mark.one_home

FLOW = "image-text-to-text"
IMAGE_TOKEN, OTHER_TOKEN = 98, 97
TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GRID_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 64,
}
AXES = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": OTHER_TOKEN}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
CONFIGS = {
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "text_config": {"model_type": "cohere2", **TEXT},
        "image_token_id": IMAGE_TOKEN,
        "downsample_factor": 2,
    },
    "llama4": {
        "vision_config": {
            **TOWER,
            "intermediate_size": 128,  # of the pixels that are shuffled together
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
        },
        "image_token_index": IMAGE_TOKEN,
    },
    "paligemma": {
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "projection_dim": 64},
        "text_config": {"model_type": "gemma", **TEXT},
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": 64,
    },
    "mistral3": {
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
        "text_config": {"model_type": "mistral", **TEXT},
        "image_token_index": IMAGE_TOKEN,
    },
    "llava_onevision": {
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": OTHER_TOKEN,
        "image_grid_pinpoints": [[32, 32], [32, 64], [64, 64]],
    },
    "smolvlm": {
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
    },
    "qwen2_5_vl": {
        "vision_config": {**GRID_TOWER, "window_size": 32, "fullatt_block_indexes": [2]},
        "text_config": {**TEXT, "rope_parameters": AXES},
        **TOKENS,
    },
    "qwen3_vl": {
        "vision_config": {
            **GRID_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        "text_config": {**TEXT, "rope_parameters": {**AXES, "mrope_interleaved": True}},
        **TOKENS,
    },
    "qwen3_5": {  # layers with recurrent states, and others with keys and values
        "vision_config": {**GRID_TOWER, "num_position_embeddings": 16},
        "text_config": {
            **TEXT,
            "rope_parameters": {**AXES, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
            "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        **TOKENS,
    },
    "glm4v": {
        "vision_config": {**TOWER, **GRID_TOWER, "num_heads": 4},
        "text_config": {**TEXT, "rope_parameters": AXES},
        **TOKENS,
    },
    "gemma4": {
        "vision_config": {
            **TOWER,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "text_config": {
            **TEXT,
            "num_hidden_layers": 6,
            "layer_types": SLIDING,
            "sliding_window": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        "image_token_id": IMAGE_TOKEN,
    },
}
#: The size of an image, of models that are cut for one.
SIZES = dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4"), "32x64")
SIZES |= dict.fromkeys(("mistral3", "llava_onevision", "glm4v"), 32)


def make_model(model_type, **changes):
    config = transformers.CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = None
    return with_random_weights(model, 1.5)


def cut(model, kind="split", **options):
    size = SIZES.get(model.config.model_type)
    options = {**({"image_size": size} if size else {}), **options}
    hooks = Plugins.discover().hooks_for(model.config.model_type, task=FLOW)
    return cut_model(with_options(wrap_model(model), options), hooks, kind)


def with_image(proxy, **settings):
    """The proxy with other settings of how images enter."""
    image = {**proxy.settings["image"], **settings}
    return replace(proxy, settings={**proxy.settings, "image": image})


#: What is learnt: tokens of an image, axes of positions, masks, layers that get features.
LEARNT = {
    "aya_vision": {"rows_per_tile": 4},
    "llama4": {"rows_per_tile": 4},
    "paligemma": {"rows_per_tile": 16, "axes": 0, "start": 1, "block": ("token_type_ids", 0, None)},
    "mistral3": {"rows_per_tile": 4, "tensors": ["image_sizes"]},
    "llava_onevision": {"rows_per_tile": 36, "tensors": ["image_sizes"]},
    "smolvlm": {"rows_per_tile": 4, "tensors": ["pixel_attention_mask"]},
    "qwen2_5_vl": {"rows_per_tile": 8, "axes": 4, "start": 0, "tensors": ["image_grid_thw"]},
    "qwen3_vl": {
        "rows_per_tile": 8,
        "axes": 4,
        "start": 0,
        "tensors": ["image_grid_thw"],
        "layers": ["layer_features.1", "layer_features.2"],
    },
    "qwen3_5": {"rows_per_tile": 8, "axes": 4, "start": 0, "tensors": ["image_grid_thw"]},
    "glm4v": {"rows_per_tile": 4, "axes": 4, "start": 0, "tensors": ["image_grid_thw"]},
    "gemma4": {
        "rows_per_tile": 8,
        "tensors": ["image_position_ids"],
        "block": ("mm_token_type_ids", 1, ["sliding_attention_mask"]),
    },
}


@pytest.mark.parametrize("model_type", LEARNT)
def test_what_a_model_does_with_images_is_learnt(model_type):
    made = cut(make_model(model_type))
    assert [part.name for part in made.proxy.parts] == ["vision", "embedding", "body", "lm_head"]
    most = 1e-4 if model_type == "qwen3_5" else 1e-5  # the model scans, the parts step
    assert made.report.max_difference <= most
    image = made.proxy.settings["image"]
    positions, blocks, geometry = image["positions"], image["blocks"], image["geometry"]
    learnt = {"rows_per_tile": image["rows_per_tile"]}
    if positions:
        learnt |= {"axes": positions["axes"], "start": positions["start"]}
    if blocks:
        learnt["block"] = (blocks["tensor"], blocks["value"], blocks["masks"])
    if geometry:
        learnt["tensors"] = list(geometry["tensors"])
    if len(image["merges"]) > 1:
        learnt["layers"] = [merge["into"] for merge in image["merges"][1:]]
    assert learnt == LEARNT[model_type]


HYBRID = {
    "vision_config": {"model_type": "siglip_vision_model", **TOWER},
    "high_res_vision_config": {
        "model_type": "sam_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "output_channels": 16,
        "window_size": 4,
        "global_attn_indexes": [0],
        "mlp_dim": 48,
    },
    "text_config": {"model_type": "llama", **TEXT},
    "image_token_id": IMAGE_TOKEN,
}
VIDEO = {
    "vision_config": {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32},
    "text_config": {"model_type": "llama", **TEXT},
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": OTHER_TOKEN,
}


def test_an_image_in_two_sizes(monkeypatch):
    monkeypatch.setitem(CONFIGS, "deepseek_vl_hybrid", HYBRID)
    made = cut(make_model("deepseek_vl_hybrid"))
    inputs = {spec.name: spec.shape for spec in made.proxy.part("vision").inputs}
    assert inputs == {
        "pixel_values": ("batch", 3, 32, 32),
        "high_res_pixel_values": ("batch", 3, 64, 64),
    }
    assert made.report.max_difference <= 1e-5


def test_what_a_tower_may_be_given_and_is_not(monkeypatch):
    monkeypatch.setitem(CONFIGS, "video_llava", VIDEO)
    made = cut(make_model("video_llava"))
    assert made.proxy.settings["image"]["refused"] == ["pixel_values_images"]
    assert made.report.max_difference <= 1e-5


@pytest.mark.parametrize(
    ("model_type", "fault"),
    [
        ("paligemma", {"blocks": None}),
        ("qwen3_vl", {"merges": [{"how": "replace", "into": "inputs_embeds"}]}),
    ],
)
def test_what_is_learnt_matters(model_type, fault):
    model = make_model(model_type)
    made = cut(model)
    faulty = with_image(made.proxy, **fault)
    if "merges" in fault:  # the layers get no features
        body = made.proxy.part("body")
        features = [f"layer_features.{n}" for n in (1, 2)]
        zeros = {name.replace(".", "__"): torch.zeros(1, 1, 64) for name in features}
        module = Filled(body.module, zeros)
        inputs = tuple(spec for spec in body.inputs if spec.name not in features)
        parts = [
            replace(part, module=module, inputs=inputs) if part is body else part
            for part in faulty.parts
        ]
        faulty = replace(faulty, parts=tuple(parts))
    with pytest.raises(CutError, match="do not equal the uncut model"):
        load_flow(FLOW).verify(model, faulty, made.sites)


def test_a_generated_placeholder_is_looked_up_as_the_model_does():
    """Gemma 4 looks up padding for tokens of images, video and sound, also those it generates."""
    model = make_model("gemma4", video_token_id=OTHER_TOKEN, audio_token_id=OTHER_TOKEN - 1)
    made = cut(model)
    image = made.proxy.settings["image"]
    assert image["looked_up_as"] == {"96": 0, "97": 0, "98": 0}
    # The token is generated, and the embedding of another row would be looked up.
    faulty = with_image(made.proxy, looked_up_as={**image["looked_up_as"], "97": 5})
    with pytest.raises(CutError, match="do not equal the uncut model"):
        load_flow(FLOW).verify(model, faulty, made.sites)


class Filled(torch.nn.Module):
    """A part with some of its inputs filled in."""

    def __init__(self, module, tensors):
        super().__init__()
        self.module = module
        self.tensors = tensors

    def forward(self, **tensors):
        return self.module(**tensors, **self.tensors)


def test_offsets_of_an_image_that_are_wrong_fail():
    model = make_model("qwen2_5_vl")
    made = cut(model)
    positions = dict(made.proxy.settings["image"]["positions"])
    positions["image"] = [[0] * 8] * 4
    with pytest.raises(CutError, match="do not equal the uncut model"):
        load_flow(FLOW).verify(model, with_image(made.proxy, positions=positions), made.sites)


# --- What is not served is refused before anything is exported ---


def refused_by(model_type, config):
    config = transformers.CONFIG_MAPPING[model_type](**config)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModelError) as caught:
        cut(model)
    return str(caught.value)


def test_images_by_cross_attention_are_refused():
    config = {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [1],
        },
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "image_token_index": IMAGE_TOKEN,
    }
    assert "has no get_image_features" in refused_by("mllama", config)


def test_recurrent_layers_in_one_graph_with_the_tower_are_refused():
    with pytest.raises((UnsupportedModelError, UsageError), match=r"one position|one image"):
        cut(make_model("qwen3_5"), kv_offload=False)


def test_a_form_that_is_not_known_is_refused():
    model = make_model("aya_vision")
    own = type(model.model).get_image_features

    class Odd(type(model.model)):
        def get_image_features(self, pixel_values, weather, **kwargs):
            return own(self, pixel_values, **kwargs)

    model.model.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match="come with weather, which"):
        cut(model)


def test_a_tower_for_one_image_in_the_bodys_graph_is_refused():
    with pytest.raises(UsageError, match="takes one image at a time"):
        cut(make_model("mistral3"), kv_offload=False)


@pytest.mark.parametrize("model_type", ["mistral3", "qwen3_vl"])
def test_a_tower_for_one_image_stays_a_part_of_a_model_that_is_not_split(model_type):
    made = cut(make_model(model_type), "whole")
    assert [part.name for part in made.proxy.parts] == ["vision", "model"]
    assert made.report.max_difference <= 1e-5
    stub = cut(make_model(model_type), "stub").proxy.part("model")
    assert not list(stub.module.embedding.parameters())
    assert not list(stub.module.head.parameters())


def test_the_size_of_images_is_said():
    hooks = Plugins.discover().hooks_for("mistral3", task=FLOW)
    with pytest.warns(UserWarning, match="exported for images of 32 x 32 pixels; image_size"):
        cut_model(wrap_model(make_model("mistral3")), hooks, "split")


@pytest.mark.parametrize("size", ["x", "0", "32x0", [1, 2, 3], 2.5])
def test_an_image_size_that_is_none(size):
    with pytest.raises(UsageError, match="image_size is"):
        cut(make_model("mistral3"), image_size=size)
