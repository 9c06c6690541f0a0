"""The verified cut of vision-language models: faults in it do not pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
from qeff_proxy import Plugins, Site
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.errors import CutError, UsageError
from qeff_proxy.flows.flow import load_flow
from qeff_proxy.load.load_model import with_options, wrap_model
from qeff_proxy_vision import tiny
from qeff_proxy_vision.tiny import FAMILIES


def cut(model, kind="split", **options):
    loaded = with_options(wrap_model(model), options)
    return cut_model(loaded, Plugins.discover().hooks_for(loaded.model_type), kind)


def verify(model, made, proxy):
    return load_flow(proxy.flow).verify(model, proxy, made.sites)


def with_settings(proxy, **settings):
    return replace(proxy, settings={"image": {**proxy.settings["image"], **settings}})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_cut_into_vision_embedding_body_and_head(family, make_model):
    made = cut(make_model(family))
    assert [part.name for part in made.proxy.parts] == ["vision", "embedding", "body", "lm_head"]
    assert made.proxy.flow == "image-text-to-text"
    embedding = made.sites["embedding"]
    assert isinstance(embedding, Site)
    assert embedding.module == "model.language_model.embed_tokens"
    assert made.report.max_difference <= 1e-5
    assert made.report.positions > 15


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_fails(family, fault, make_model):
    model = make_model(family)
    made = cut(model)
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, fault(made.proxy))


@pytest.mark.parametrize("family", ["gemma3", "molmo2"])
def test_an_image_whose_tokens_do_not_see_each_other_fails(family, make_model):
    model = make_model(family)
    made = cut(model)
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, with_settings(made.proxy, blocks=None))


def test_a_sliding_window_that_is_ignored_fails(make_model):
    model = make_model("gemma3")
    made = cut(model)
    body = made.proxy.part("body")
    masks = tuple(replace(mask, kind="causal", size=None) for mask in body.masks)
    parts = [replace(part, masks=masks) if part is body else part for part in made.proxy.parts]
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, replace(made.proxy, parts=tuple(parts)))


def test_an_embedding_without_its_scale_fails(make_model, changed):
    model = make_model("gemma3")
    made = cut(model)
    assert made.sites["embedding"].scale == 8
    unscaled = changed(made.proxy, "embedding", lambda value: value / 8)
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, unscaled)


def test_image_rows_that_get_the_scale_of_the_embedding_fail(make_model, changed):
    model = make_model("gemma3")
    made = cut(model)
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, changed(made.proxy, "vision", lambda value: value * 8))


def test_features_that_replace_where_they_should_be_added_fail(make_model):
    model = make_model("molmo2")
    made = cut(model)
    merge = {"how": "replace", "into": "inputs_embeds", "features": "image_features"}
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, with_settings(made.proxy, merges=[merge]))


def test_features_for_another_layer_fail(make_model):
    model = make_model("granite4_vision")
    made = cut(model)
    merges = [dict(merge) for merge in made.proxy.settings["image"]["merges"]]
    merges[1]["features"], merges[2]["features"] = merges[2]["features"], merges[1]["features"]
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, with_settings(made.proxy, merges=merges))


def test_embeddings_that_are_not_cleared_fail(make_model):
    model = make_model("granite4_vision")
    made = cut(model)
    merges = made.proxy.settings["image"]["merges"][1:]
    with pytest.raises(CutError, match="do not equal the uncut model"):
        verify(model, made, with_settings(made.proxy, merges=merges))


def test_the_model_is_as_it_was_after_the_cut(make_model):
    model = make_model("granite4_vision")
    before = {name: id(module) for name, module in model.named_modules()}
    cut(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_and_body_in_one_graph(family, make_model):
    model = make_model(family)
    made = cut(model, kv_offload=False)
    assert [part.name for part in made.proxy.parts] == ["embedding", "body", "lm_head"]
    assert made.report.max_difference <= 1e-5
    names = [spec.name for spec in made.proxy.part("body").inputs]
    assert "pixel_values" in names
    assert "image_rows" in names
    again = cut(model, **made.proxy.settings)
    assert [part.name for part in again.proxy.parts] == ["embedding", "body", "lm_head"]


def test_an_option_that_is_neither_yes_nor_no_is_refused(make_model):
    with pytest.raises(UsageError, match="kv_offload is 'no'"):
        cut(make_model("llava"), kv_offload="no")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_not_split_is_one_graph(family, make_model):
    made = cut(make_model(family), "whole")
    assert [part.name for part in made.proxy.parts] == ["model"]
    assert made.report.max_difference <= 1e-5


def test_a_stub_is_one_graph_without_the_vocabulary(make_model):
    made = cut(make_model("llava"), "stub")
    (part,) = made.proxy.parts
    assert part.inputs[0].name == "input_ids"
    assert part.outputs[0].shape == ("batch", "query", 64)
    assert not list(part.module.embedding.parameters())
    assert not list(part.module.head.parameters())


def test_a_tower_that_joins_its_images_takes_one_at_a_time():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    tower = transformers.PixtralVisionConfig(
        **sizes, num_attention_heads=4, image_size=28, patch_size=7
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    text = transformers.MistralConfig(**sizes, vocab_size=131, **heads)
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=130,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = tiny.with_random_weights(transformers.LlavaForConditionalGeneration(config), 1.5)
    with pytest.warns(UserWarning, match="exported for images of 28 x 28 pixels"):
        made = cut(model)
    assert made.proxy.settings["image"]["geometry"]["tensors"] == {"image_sizes": [[28, 28]]}
    assert made.report.max_difference <= 1e-5


def test_tiles_in_an_order_of_the_models_own_are_no_grid(make_model):
    model = make_model("llava_next")
    ordered = model.model.pack_image_features

    def reversed_lines(*args, **named):
        images, lengths = ordered(*args, **named)
        return [image.flip(0) for image in images], lengths

    model.model.pack_image_features = reversed_lines
    with pytest.warns(UserWarning, match="exported for images of 28 x 28 pixels"):
        made = cut(model)
    assert made.proxy.settings["image"]["grid"] is None
    assert made.report.max_difference <= 1e-5
