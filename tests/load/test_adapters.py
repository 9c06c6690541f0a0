"""LoRA adapters are merged as peft merges them, and whatever cannot be merged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_models import eager, letters, make_adapter, merged_by_peft
from qeff_proxy import Plugins
from qeff_proxy.auto import QEffAutoPeftModelForCausalLM
from qeff_proxy.backends.torch.backend import model_of_export
from qeff_proxy.cli import main
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.adapter_files import parse_adapters
from qeff_proxy.load.first_layers import all_layers
from qeff_proxy.load.load_model import load_model
from safetensors.torch import load_file, save_file

# What peft says of itself, and of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
PLUGINS = Plugins.discover()
IDS = torch.tensor([[5, 9, 40, 77, 3, 61, 22, 8, 15, 90, 31]])
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*\.(q_proj|o_proj|gate_proj)",
            "r": 4,
            "rank_pattern": {r"layers\.[03]\.self_attn\.q_proj": 6, "o_proj": 2},
            "alpha_pattern": {"gate_proj": 3},
            "use_rslora": True,
            "lora_alpha": 5,
        },
    ),
    "some layers": (
        "llama",
        {
            "target_modules": ["k_proj", "up_proj"],
            "layers_to_transform": [1, 4],
            "exclude_modules": r".*\.4\.mlp\.up_proj",
        },
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "embeddings and head": (
        "llama",
        {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "square Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "bias": ("gpt2", {"target_modules": ["attn.c_proj"], "lora_bias": True}),
    "dora of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
}


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return make_adapter(bases["llama"], folder, target_modules=["q_proj"], r=4)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def assert_equal(ours: Any, oracle: Any, base: Path) -> None:
    """Every weight and the logits equal peft's to 1e-6 of the peak; the base model's differ."""
    expected = dict(oracle.named_parameters())
    for name, weight in ours.named_parameters():
        peak = expected[name].abs().max()
        assert (weight - expected[name]).abs().max() <= 1e-6 * peak, name
    logits = logits_of(oracle)
    assert (logits_of(ours) - logits).abs().max() <= 1e-6 * logits.abs().max()
    plain = logits_of(eager(base))
    assert (plain - logits).abs().max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_peft_does(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    name, settings = ADAPTERS[kind]
    adapter = make_adapter(bases[name], tmp_path / "adapter", **settings)
    oracle = merged_by_peft(bases[name], adapter)
    whole = load_model(str(bases[name]), adapters=[adapter])
    assert_equal(whole.model, oracle, bases[name])
    assert whole.sample is not None
    sampled = whole.sample(all_layers)
    assert_equal(sampled.model, oracle, bases[name])


def test_several_adapters_are_merged_by_their_weights(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    one = make_adapter(base, tmp_path / "one", target_modules=["q_proj", "up_proj"], r=4)
    two = make_adapter(base, tmp_path / "two", 1, target_modules=["q_proj", "o_proj"], r=6)
    model = load_model(str(base), adapters=[one, two]).model
    assert_equal(model, merged_by_peft(base, one, two), base)
    oracle = PeftModel.from_pretrained(eager(base), one, "one")
    oracle.load_adapter(two, "two")
    oracle.add_weighted_adapter(["one", "two"], [0.5, -1.5], "both", combination_type="cat")
    oracle.set_adapter("both")
    weighted = load_model(str(base), adapters={str(one): 0.5, str(two): -1.5})
    assert weighted.identity != load_model(str(base), adapters=[f"{one}@0.5", two]).identity
    assert_equal(weighted.model, oracle.merge_and_unload().eval(), base)


def test_export_streams_the_merged_weights_and_the_command_finds_it_again(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases["llama"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    face = QEffAutoPeftModelForCausalLM.from_pretrained(adapter, proxy="split")
    folder = face.export()
    cut = json.loads((folder / "export.json").read_text())["cut"]
    assert cut["weights"].startswith("streamed from the checkpoint; ")
    assert cut["adapters"] == [{"path": str(adapter), "weight": 1.0}]
    oracle = merged_by_peft(base, adapter)
    expected = oracle.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    result = face.generate(inputs={"input_ids": IDS}, max_new_tokens=12, do_sample=False)
    assert result.generated_ids.tolist() == expected[:, IDS.shape[1] :].tolist()
    plain = eager(base).generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert plain.tolist() != expected.tolist()
    assert main(["export", str(adapter)]) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")
    again = ["export", str(base), "--output", str(folder)]
    assert main([*again, "--adapter", f"{adapter}@1"]) == 0
    assert main([*again, "--adapter", f"{adapter}@2"]) != 0
    assert "holds another export" in capsys.readouterr().err
    other = make_adapter(base, tmp_path / "other", 1, target_modules=["q_proj"])
    face.load_adapter(other, "other")
    face.set_adapter("other")
    assert face.active_adapter == "other"
    assert_equal(face.model, merged_by_peft(base, other), base)
    with pytest.raises(UsageError, match=r"no adapter is named 'third'. Known: default, other"):
        face.set_adapter("third")


def test_each_prompt_has_its_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    """QEfficient's calls of several adapters: the tokens of peft, one prompt after the other."""
    base = bases["llama"]
    one, two = (
        make_adapter(base, tmp_path / name, seed, target_modules=["q_proj", "up_proj"], r=4)
        for seed, name in enumerate(("one", "two"))
    )
    tokenizer = letters()
    face = QEffAutoPeftModelForCausalLM.from_pretrained(one, "one", finite_adapters=True)
    face.load_adapter(two, "two")
    face.load_adapter(one, "three")
    assert [face.unload_adapter("three") for _ in range(2)] == [True, False]
    with pytest.raises(UsageError, match="'one' is active"):
        face.unload_adapter("one")
    face.compile(prefill_seq_len=4, ctx_len=24)
    prompts, names = ["abcdefgh", "badc", "abcdefgh", "abcdefgh"], ["two", "base", "one", "two"]
    models = {"one": merged_by_peft(base, one), "two": merged_by_peft(base, two)}
    models["base"] = eager(base)
    result = face.generate(tokenizer, prompts, prompt_to_adapter_mapping=names, generation_len=9)
    rows = []
    for prompt, name in zip(prompts, names, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = models[name].generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        rows.append(made[0, ids.shape[1] :].tolist())
    assert result.generated_ids.tolist() == rows
    assert result.generated_texts == tokenizer.batch_decode(rows)
    assert len({str(row) for row in rows}) == 3
    assert face.active_adapter == "one"

    face.set_adapter("two")  # compiled as before
    options = face._compiled.options  # type: ignore[union-attr]
    assert (options.prefill_seq_len, options.ctx_len) == (4, 24)
    batch = tokenizer(prompts[0], return_tensors="pt")
    assert face.generate(**batch, max_new_tokens=9).generated_ids.tolist() == rows[:1]
    face.set_adapter("one")
    with pytest.raises(UsageError, match="'one' is active"):
        face.load_adapter(two, "one")
    with pytest.raises(UsageError, match="'base' is the name of the base model"):
        face.load_adapter(two, "base")
    with pytest.raises(UsageError, match="4 prompts and 1 names"):
        face.generate(tokenizer, prompts, prompt_to_adapter_mapping="one")
    with pytest.raises(UsageError, match="holds no adapter"):
        QEffAutoPeftModelForCausalLM.from_pretrained(base, "one", adapters=[one])
    with pytest.raises(UsageError, match="4 prompts and 3 names"):
        face.generate(tokenizer, prompts, prompt_to_adapter_mapping=names[1:])
    with pytest.raises(UsageError, match=r"no adapter is named 'three'\. Known: one, two"):
        face.generate(tokenizer, ["a"], prompt_to_adapter_mapping=["three"])
    with pytest.raises(UsageError, match="a dump is of one adapter"):
        face.generate(tokenizer, prompts, prompt_to_adapter_mapping=names, write_io=True)


def test_a_name_stands_for_all_that_was_merged_under_it(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    base = bases["llama"]
    other = make_adapter(base, tmp_path / "other", 7, target_modules=["q_proj"], r=4)
    face = QEffAutoPeftModelForCausalLM.from_pretrained(adapter, "both", adapters={other: 0.5})
    before = {name: one.clone() for name, one in face.model.state_dict().items()}
    face.load_adapter(other, "other")
    face.set_adapter("other")
    face.set_adapter("both")
    assert all(torch.equal(one, before[name]) for name, one in face.model.state_dict().items())


def test_an_adapter_of_the_head_has_a_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    """peft saves the head's own weight with it, which is no change."""
    base = bases["llama"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "v_proj"], r=4)
    assert any("base_layer" in key for key in load_file(adapter / "adapter_model.safetensors"))
    head = eager(base).lm_head.weight
    change = merged_by_peft(base, adapter).lm_head.weight - head
    ours = load_model(str(base), adapters=[f"{adapter}@-0.5"]).model.lm_head.weight
    torch.testing.assert_close(ours, head - 0.5 * change, rtol=0, atol=1e-6)
    twice = load_model(str(base), adapters=[str(adapter), f"{adapter}@0.25"]).model.lm_head.weight
    torch.testing.assert_close(twice, head + 1.25 * change, rtol=0, atol=1e-6)


def test_an_export_that_links_the_base_has_the_merged_weights_in_pytorch(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """The linked file of the base has weights of the same names, which were taken once."""
    loaded = load_model(str(bases["llama"]), adapters=[str(adapter)])
    hooks = PLUGINS.hooks_for("llama")
    export = export_model(loaded, hooks, output=tmp_path / "export", weights="reference")
    assert set(export.files) == {"body.safetensors", "model.safetensors"}
    assert_equal(model_of_export(export), merged_by_peft(bases["llama"], adapter), bases["llama"])


def test_fewer_layers_of_a_model_with_an_adapter(bases: dict[str, Path], adapter: Path) -> None:
    face = QEffAutoPeftModelForCausalLM.from_pretrained(adapter, num_hidden_layers=2)
    oracle = dict(merged_by_peft(bases["llama"], adapter).named_parameters())
    parameters = dict(face.model.named_parameters())
    assert "model.layers.2.mlp.up_proj.weight" not in parameters
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (parameters[name] - oracle[name]).abs().max() <= 1e-6 * oracle[name].abs().max()
    face.load_adapter(adapter, "other")
    with pytest.raises(UsageError, match="set_adapter keeps no config, num_hidden_layers"):
        face.set_adapter("other")
    config = face.config
    config.rms_norm_eps = 0.5
    with pytest.raises(UsageError, match="config= changes the base model of the adapter"):
        QEffAutoPeftModelForCausalLM.from_pretrained(adapter, config=config)


def test_an_adapter_beside_its_base_model_is_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "gpt2"))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn"])
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    before = load_model(str(base))
    assert_equal(before.model, merged_by_peft(bases["gpt2"], adapter), bases["gpt2"])
    rewrite(base, lambda tensors: tensors.update({n: t * 2 for n, t in tensors.items()}))
    assert load_model(str(base)).identity != before.identity


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG: dict[str, tuple[Any, str]] = {
    "another method": ({"peft_type": "LOHA"}, "has peft_type LOHA, which is not merged here"),
    "tokens": ({"trainable_token_indices": [3]}, "sets trainable_token_indices, which is not"),
    "parameters": ({"target_parameters": ["experts"]}, "sets target_parameters, which is not"),
    "unknown": ({"of_tomorrow": True}, "sets of_tomorrow, which is not merged here"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "changed the base model's weights"),
    "rank": ({"r": 3}, r"has shape \[4, 64\], where model.* needs \[3, 64\]"),
    "zero": ({"r": 0}, "has values that cannot be right"),
    "names": ({"target_modules": ["v_proj"]}, "that target_modules in .* do not name"),
    "lacks": ({"target_modules": ["q_proj", "v_proj"]}, "lacks .*v_proj.lora_A.weight, although"),
    "dora": ({"use_dora": True}, "and use_dora in .* do not agree"),
    "pair": (lambda t: t.pop(Q0), "q_proj.lora_B.weight in .* has no lora_A beside it"),
    "module": (
        lambda t: t.update(
            {k.replace("layers.0", "layers.9"): t.pop(k) for k in list(t) if ".0." in k}
        ),
        "layers.9.* in .* is for .*, which LlamaForCausalLM does not have",
    ),
    "shape": (lambda t: t.update({Q0: t[Q0][:, :32].clone()}), r"layers.0.* has shape \[4, 32\]"),
    "codes": (lambda t: t.update({Q0: t[Q0].to(torch.int8)}), "is of int8, not of floating point"),
    "strange": (lambda t: t.update({"lora_router": t[Q0].clone()}), "lora_router in .* is of a me"),
    "norm": (
        lambda t: t.update({"base_model.model.model.norm.bias": t[Q0].clone()}),
        "is for model.norm.bias, which LlamaForCausalLM does not have",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_merged_is_named(
    kind: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    change, message = WRONG[kind]
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    if isinstance(change, dict):
        settings = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    else:
        rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(str(bases["llama"]), adapters=[copy])
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_elements_that_are_not_finite_are_named(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors[Q0].fill_(float("nan")))
    loaded = load_model(str(bases["llama"]), adapters=[copy])
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight in .* not finite"):
        export_model(loaded, PLUGINS.hooks_for("llama"), output=tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_adapter_of_another_base_is_named(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    with (
        pytest.warns(UserWarning, match=r"was made for llama, and is used with .*gpt2"),
        pytest.raises(CheckpointError, match=r"q_proj.* GPT2LMHeadModel does not have"),
    ):
        load_model(str(bases["gpt2"]), adapters=[adapter])


def test_two_adapters_cannot_replace_one_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    one = make_adapter(bases["llama"], tmp_path / "one", **settings)
    two = make_adapter(bases["llama"], tmp_path / "two", 1, **settings)
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .* both change lm_head.weight"):
        load_model(str(bases["llama"]), adapters=[one, two])
    with pytest.raises(CheckpointError, match=r"which a weight of 0.5 cannot scale"):
        load_model(str(bases["llama"]), adapters={str(one): 0.5})


def test_a_tied_weight_is_changed_with_both_names_or_not_at_all(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["gpt2"]  # whose head is tied
    one = make_adapter(base, tmp_path / "one", target_modules=["c_attn"], modules_to_save=["wte"])
    with pytest.raises(CheckpointError, match=r"changes transformer.wte.weight, which .* lm_head"):
        load_model(str(base), adapters=[one])
    both = make_adapter(
        base, tmp_path / "both", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]
    )
    loaded = load_model(str(base), adapters=[both])
    oracle = merged_by_peft(base, both)
    assert_equal(loaded.model, oracle, base)
    assert loaded.sample is not None
    assert_equal(loaded.sample(all_layers).model, oracle, base)
    for number, module in enumerate(("wte", "lm_head")):
        place = tmp_path / f"tied {number}"
        tied = make_adapter(base, place, target_modules=["c_fc", module], ensure_weight_tying=True)
        with pytest.raises(CheckpointError, match=r"is of LoRA on .*wte.*, which are one weight"):
            load_model(str(base), adapters=[tied])


def test_paths_and_weights() -> None:
    assert parse_adapters("a") == [("a", 1.0)]
    assert parse_adapters(["a@0.5", Path("b")]) == [("a", 0.5), ("b", 1.0)]
    assert parse_adapters({"a@b": -2}) == [("a@b", -2.0)]
    for wrong in (["a@much"], ["a@nan"], ["a@1e39"], {"a": "1"}, {"a": True}):
        with pytest.raises(UsageError, match=r"the adapter a.* has weight"):
            parse_adapters(wrong)  # type: ignore[arg-type]
