"""A cut that is not equal to the model is refused; each fault here was put in on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.cut.inspect_model import inspect_model
from qeff_proxy.errors import CutError, PluginError, UnsupportedModelError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.families.decoder import EmbeddingPart, HeadPart
from qeff_proxy.hookspecs import hookimpl
from qeff_proxy.layers.replace_modules import replace_modules
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.parts import MaskSpec, Part, Proxy
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.sites import Absent, Site
from torch import nn


def cut_with(model: Any, fault: Callable[[Proxy], Proxy]) -> Any:
    """Cut ``model`` with a plugin that makes a fault of its own."""
    generic = Plugins.discover().hooks_for("none-such")

    class Faulty:
        @hookimpl
        def build_proxy(self, model: Any, embedding: Any, lm_head: Any, kind: Any) -> Proxy:
            return fault(generic.build_proxy(model, embedding, lm_head, kind))

    plugins = Plugins()
    plugins.register(Faulty(), [model.config.model_type], name="faulty")
    return cut_model(wrap_model(model), plugins.hooks_for(model.config.model_type), "split")


def exchange(proxy: Proxy, name: str, **changes: Any) -> Proxy:
    parts = [
        dataclasses.replace(part, **changes) if part.name == name else part for part in proxy.parts
    ]
    return dataclasses.replace(proxy, parts=tuple(parts))


def test_a_sound_cut_passes(make_model: Any) -> None:
    cut = cut_with(make_model("gemma2"), lambda proxy: proxy)
    assert cut.report is not None
    assert cut.report.max_difference < 2e-5 * cut.report.largest_value
    assert cut.report.positions == 22


def test_a_dropped_embedding_scale_is_found(make_model: Any) -> None:
    model = make_model("gemma2")

    class Unscaled(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            table = model.model.embed_tokens.weight
            return {"inputs_embeds": nn.functional.embedding(input_ids, table)}

    with pytest.raises(CutError, match=r"embedding at model\.embed_tokens.*lm_head at lm_head"):
        cut_with(model, lambda proxy: exchange(proxy, "embedding", module=Unscaled()))


def test_a_dropped_soft_cap_is_found(make_model: Any) -> None:
    model = make_model("gemma2")

    class Uncapped(nn.Module):
        def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": model.lm_head(last_hidden_state)}

    with pytest.raises(CutError, match="do not equal the uncut model"):
        cut_with(model, lambda proxy: exchange(proxy, "lm_head", module=Uncapped()))


def test_sliding_layers_taken_for_full_ones_are_found(make_model: Any) -> None:
    def full(proxy: Proxy) -> Proxy:
        masks = tuple(MaskSpec(mask.name, "causal") for mask in proxy.part("body").masks)
        return exchange(proxy, "body", masks=masks)

    with pytest.raises(CutError, match="do not equal the uncut model"):
        cut_with(make_model("gemma2"), full)


def test_a_real_window_too_long_for_any_test_text_is_still_verified(make_model: Any) -> None:
    def full(proxy: Proxy) -> Proxy:
        masks = tuple(MaskSpec(mask.name, "causal") for mask in proxy.part("body").masks)
        return exchange(proxy, "body", masks=masks)

    model = make_model("gemma2", sliding_window=100, max_position_embeddings=160)
    assert cut_with(model, lambda proxy: proxy).report is not None
    with pytest.raises(CutError, match="do not equal the uncut model"):
        cut_with(model, full)
    assert model.config.sliding_window == 100


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_factors_that_stay_those_of_short_texts_are_found(
    kind: str, make_model: Any
) -> None:
    """The real limit is beyond any test text, so it is lowered while the cut is verified."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * i for i in range(8)]}
    longrope = {**factors, "original_max_position_embeddings": 4096, "attention_factor": 1.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= longrope
    model = make_model("llama", max_position_embeddings=8192, rope_parameters=rope)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        before = model(ids).logits

    def short(proxy: Proxy) -> Proxy:
        body = proxy.part("body").module
        config = transformers.LlamaConfig(**{**model.config.to_dict(), "rope_parameters": None})
        rotary = type(model.model.rotary_emb)(config)
        [path] = [path for path, _ in body.named_modules() if path.endswith("rotary_emb")]
        return exchange(proxy, "body", module=replace_modules(body, {path: rotary}))

    assert cut_with(model, lambda proxy: proxy).report is not None
    with pytest.raises(CutError, match="do not equal the uncut model"):
        cut_with(model, short)
    assert model.config.max_position_embeddings == 8192
    assert model.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_positions_shifted_by_one_are_found(make_model: Any) -> None:
    def shifted(proxy: Proxy) -> Proxy:
        body = proxy.part("body").module
        forward = body.forward

        class Shifted(nn.Module):
            def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
                result: dict[str, torch.Tensor] = forward(
                    **{**tensors, "position_ids": tensors["position_ids"] + 1}
                )
                return result

        return exchange(proxy, "body", module=Shifted())

    with pytest.raises(CutError, match="do not equal the uncut model"):
        cut_with(make_model("gpt2"), shifted)


def test_the_wrong_head_weights_are_found_and_the_worst_logit_named(make_model: Any) -> None:
    model = make_model("llama")

    def wrong(proxy: Proxy) -> Proxy:
        head = nn.Linear(64, 131, bias=False)
        head.weight.data = model.lm_head.weight.data.clone()
        head.weight.data[77] += 0.5
        changed = replace_modules(model, {"lm_head": head})
        return exchange(proxy, "lm_head", module=HeadPart(changed, "model"))

    with pytest.raises(CutError, match=r"logit \[\d, \d+, 77\] is .* instead of .*, off by"):
        cut_with(model, wrong)


def test_a_part_that_does_not_run_is_an_error_that_names_the_sites(make_model: Any) -> None:
    class Broken(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(CutError, match=r"cannot be run \(embedding at .*shapes do not fit"):
        cut_with(make_model("llama"), lambda proxy: exchange(proxy, "embedding", module=Broken()))


def test_a_model_with_nan_weights_is_refused(make_model: Any) -> None:
    model = make_model("llama")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(CutError, match="NaN or infinite"):
        cut_with(model, lambda proxy: proxy)


def test_a_missing_part_is_refused(make_model: Any) -> None:
    def headless(proxy: Proxy) -> Proxy:
        return dataclasses.replace(proxy, parts=proxy.parts[:2])

    with pytest.raises(CutError, match="gave no lm_head part"):
        cut_with(make_model("llama"), headless)


def test_a_body_that_keeps_a_vocabulary_weight_is_refused(make_model: Any, tmp_path: Any) -> None:
    from qeff_proxy.export.export_model import export_model

    model = make_model("llama")
    generic = Plugins.discover().hooks_for("none-such")

    class Greedy:
        @hookimpl
        def build_proxy(self, model: Any, embedding: Any, lm_head: Any, kind: Any) -> Proxy:
            proxy = generic.build_proxy(model, embedding, lm_head, kind)
            return exchange(proxy, "embedding", weights="body")

    plugins = Plugins()
    plugins.register(Greedy(), ["llama"], name="greedy")
    with pytest.raises(CutError, match=r"still holds model\.embed_tokens\.weight"):
        export_model(wrap_model(model), plugins.hooks_for("llama"), output=tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_a_site_that_is_not_there_is_the_plugins_error(make_model: Any) -> None:
    class Lost:
        @hookimpl
        def locate_embedding(self, model: Any, config: Any) -> Site:
            return Site("model.nowhere")

    plugins = Plugins()
    plugins.register(Lost(), ["llama"], name="lost")
    with pytest.raises(PluginError, match=r"plugin lost locates .* at 'model\.nowhere'"):
        cut_model(wrap_model(make_model("llama")), plugins.hooks_for("llama"), "split")


class Elsewhere:
    """A plugin that knows one site wrong."""

    def __init__(self, **sites: str) -> None:
        self.sites = sites

    @hookimpl
    def locate_embedding(self) -> Site:
        return Site(self.sites.get("embedding", "model.embed_tokens"))

    @hookimpl
    def locate_lm_head(self) -> Site:
        return Site(self.sites.get("lm_head", "lm_head"))


@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        (
            {"lm_head": "model.layers.0.mlp.down_proj"},
            CutError,
            r"body part runs .*down_proj, which was located as the lm_head",
        ),
        ({"embedding": "model.norm"}, PluginError, "a LlamaRMSNorm, which holds no table"),
        ({"embedding": "model.embed_token"}, PluginError, r"Near it are model\.embed_tokens"),
    ],
)
def test_a_site_elsewhere_is_refused(sites: Any, error: Any, message: str, make_model: Any) -> None:
    plugins = Plugins()
    plugins.register(Elsewhere(**sites), ["llama"], name="elsewhere")
    with pytest.raises(error, match=message):
        cut_model(wrap_model(make_model("llama")), plugins.hooks_for("llama"), "split")


def test_a_plugins_cut_that_is_not_equal_is_laid_to_the_plugin(make_model: Any) -> None:
    generic = Plugins.discover().hooks_for("none-such")

    class Unscaled:
        @hookimpl
        def build_proxy(self, model: Any, embedding: Any, lm_head: Any, kind: Any) -> Proxy:
            proxy = generic.build_proxy(model, embedding, lm_head, kind)
            table = nn.Embedding.from_pretrained(model.model.embed_tokens.weight * 0.5)
            return exchange(proxy, "embedding", module=EmbeddingPart(table))

    plugins = Plugins()
    plugins.register(Unscaled(), ["llama"], name="unscaled")
    with pytest.raises(CutError, match=r"Plugin 'unscaled' cut it: .* such as a scale"):
        cut_model(wrap_model(make_model("llama")), plugins.hooks_for("llama"), "split")


def test_absent_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Absent(" ")


def test_a_model_that_keeps_its_states_elsewhere_than_in_a_cache_is_refused_by_name() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(UnsupportedModelError, match="RwkvModel keeps no cache"):
        cut_model(wrap_model(model), Plugins().hooks_for("rwkv"), "split")


def test_the_model_is_left_as_it_was(make_model: Any) -> None:
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    model = make_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    cut_with(model, lambda proxy: proxy)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert modeling_llama.create_causal_mask is masking_utils.create_causal_mask


def test_a_part_takes_the_models_own_parameters(make_model: Any) -> None:
    model = make_model("llama")
    part = EmbeddingPart(model.get_input_embeddings())
    assert next(part.parameters()) is model.model.embed_tokens.weight
    assert isinstance(Part("p", part, (), (), "vocabulary"), Part)


def test_a_model_of_images_that_no_plugin_claims_is_refused_before_its_tower_is_dropped() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 1, **small},
        text_config={"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 1, **small},
        image_token_id=5,
    )
    loaded = wrap_model(transformers.LlavaForConditionalGeneration(config))
    hooks = Plugins().hooks_for(config.model_type)
    for use in (lambda: inspect_model(loaded, hooks), lambda: export_model(loaded, hooks)):
        with pytest.raises(UnsupportedModelError, match="models take images, and no plugin"):
            use()
