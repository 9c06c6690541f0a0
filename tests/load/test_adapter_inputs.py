"""LoRA adapters as inputs: one export runs all of them as peft does, and refuses what it cannot."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import eager, letters, make_adapter, merged_by_peft
from qeff_proxy import Plugins
from qeff_proxy.auto import QEffAutoPeftModelForCausalLM
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import read_dump
from qeff_proxy.dump.format import name_tensor
from qeff_proxy.errors import CheckpointError, UnsupportedModelError, UsageError
from qeff_proxy.export.cache_key import find_known_export
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.adapter_inputs import with_adapter
from qeff_proxy.load.load_model import load_model
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
IDS = [5, 9, 40, 77, 3, 61, 22, 8, 15, 90, 31]
NEW = 12
#: Of each base: what a first and a second adapter change.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 4,
            "rank_pattern": {"v_proj": 2},
        },
        {
            "target_modules": ["q_proj", "gate_proj"],
            "r": 6,
            "use_rslora": True,
            "lora_alpha": 5,
            "layers_to_transform": [1, 4],
        },
    ),
    "gpt2": (
        {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True},
        {"target_modules": ["attn.c_proj"], "r": 2, "fan_in_fan_out": True},
    ),
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def made(
    request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path], Any]:
    """A base model, two adapters, and the export that takes both."""
    root, base = tmp_path_factory.mktemp("inputs"), bases[request.param]
    adapters = [
        make_adapter(base, root / name, number, **settings)
        for number, (name, settings) in enumerate(
            zip(("one", "two"), SETTINGS[request.param], strict=True)
        )
    ]
    loaded = load_model(str(base), adapters=adapters, adapter_as_input=True)
    hooks = Plugins.discover().hooks_for(request.param)
    return base, adapters, export_model(loaded, hooks, output=root / "export", taps="layers")


def run(export: Any, folder: Path, backend: str = "onnxruntime", **options: Any) -> Any:
    """The ids that an export generates, and the logits that each was chosen by."""
    compiled = compile_export(export, backend, CompileOptions(**options))
    hooks = Plugins.discover().hooks_for(export.model["model_type"])
    result = run_compiled(
        compiled,
        hooks,
        Request(inputs={"input_ids": [IDS]}),
        settings={"max_new_tokens": NEW, "do_sample": False},
        write_io=True,
        io_folder=folder,
    )
    dump = read_dump(folder)
    last = [step for step in dump.steps if step.phase == "prefill"][-1:]
    chosen = [*last, *(step for step in dump.steps if step.phase == "decode")]
    logits = [dump.array(step.phase, step.index, "lm_head.out.logits")[0, -1] for step in chosen]
    return result.outputs["generated_ids"][0].tolist(), np.stack(logits)


def expected(model: Any) -> Any:
    """The same of a model in PyTorch."""
    ids = torch.tensor([IDS])
    made = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(made[:, :-1]).logits[0, len(IDS) - 1 :]
    return made[0, len(IDS) :].tolist(), logits.numpy()


def assert_equal(ours: Any, oracle: Any) -> None:
    assert ours[0] == oracle[0]
    assert np.abs(ours[1] - oracle[1]).max() <= 1e-5 * np.abs(oracle[1]).max()


def test_one_export_runs_each_adapter_and_the_base_as_peft_does(
    made: tuple[Path, list[Path], Any], tmp_path: Path
) -> None:
    base, adapters, export = made
    assert export.cut["weights"].startswith("streamed from the checkpoint; ")
    assert min(export.cut["traced_layers"].values()) < 6  # the cost does not grow with depth
    seen = [expected(eager(base))]
    assert_equal(run(with_adapter(export, []), tmp_path / "base"), seen[0])
    for adapter in adapters:
        unmerged = expected(PeftModel.from_pretrained(eager(base), adapter).eval())
        assert_equal(unmerged, expected(merged_by_peft(base, adapter)))
        chosen = with_adapter(export, adapter.name)
        for backend in ("onnxruntime", "torch"):
            assert_equal(run(chosen, tmp_path / adapter.name / backend, backend), unmerged)
        chunked = run(chosen, tmp_path / adapter.name / "chunks", prefill_seq_len=4, ctx_len=32)
        assert_equal(chunked, unmerged)
        assert all(np.abs(unmerged[1] - one[1]).max() > 1e-2 for one in seen)
        seen.append(unmerged)
    one = PeftModel.from_pretrained(eager(base), adapters[0])
    one.add_weighted_adapter(["default"], [-0.5], "weighted", combination_type="cat")
    one.set_adapter("weighted")
    halved = with_adapter(export, f"{adapters[0]}@-0.5")
    assert_equal(run(halved, tmp_path / "half"), expected(one.eval()))
    assert len(list((export.folder / "compiled").glob("onnxruntime-*"))) <= 2  # with and without


def test_a_dump_has_the_adapter_once(made: tuple[Path, list[Path], Any], tmp_path: Path) -> None:
    _, adapters, export = made
    run(with_adapter(export, adapters[0]), tmp_path / "dump")
    dump = read_dump(tmp_path / "dump")
    assert dump.provenance["adapter"] == str(adapters[0])
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    name = str(name_tensor("body", "in", key.removeprefix("base_model.model.")))
    for index in (0, NEW - 2):
        found = dump.array("decode", index, name)
        np.testing.assert_array_equal(found[: len(tensors[key])], tensors[key].numpy())
    file = tmp_path / "dump" / "decode" / f"{name}.npy"
    assert file.stat().st_size < 2 * found.nbytes


def test_the_command_exports_switches_verifies_and_compares(
    made: tuple[Path, list[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (one, two), export = made
    flags = ["--adapter-as-input", "--adapter", str(one), "--adapter", str(two)]
    shown = {}
    for name in (None, "one", "two"):
        chosen = [] if name is None else ["--adapter", name]
        ids = ",".join(map(str, IDS))
        place = ["--io-dir", str(tmp_path / str(name)), "--max-new-tokens", str(NEW), "--json"]
        assert main(["generate", str(export.folder), ids, "--ids", *chosen, *place]) == 0
        shown[name] = json.loads(capsys.readouterr().out)["generated_ids"][0]
    assert shown["one"] == expected(merged_by_peft(base, one))[0]
    assert shown["two"] == expected(merged_by_peft(base, two))[0]
    assert len({str(ids) for ids in shown.values()}) == 3
    for more in ([], ["--adapter", "two"]):
        assert main(["verify", str(export.folder), "--ids", "5,9,40,77", *more]) == 0
    both = tmp_path / "both"
    assert main(["export", str(base), *flags, "--num-layers", "3", "--output", str(both)]) == 0
    assert main(["export", str(base), *flags, "--output", str(both), "--force"]) == 0
    known = partial(find_known_export, str(base), "split", dtype="float32", options={}, output=both)
    assert known(adapters=[one, two], adapter_as_input=True) is not None
    assert known(adapters=[one], adapter_as_input=True) is None
    assert known(adapters=[one, two]) is None
    out = tmp_path / "verified"
    assert main(["verify", str(base), *flags, "--ids", "5,9,40", "--io-dir", str(out)]) == 0
    assert main(["verify", str(base), *flags, "--ids", "5,9,40", "--by-layer"]) == 0
    assert main(["compare", str(out / "reference"), str(out / "onnxruntime")]) == 0
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) != 0
    capsys.readouterr()


def test_the_face_switches_without_another_export(bases: dict[str, Path], tmp_path: Path) -> None:
    base, tokenizer = bases["llama"], letters()
    one, two, wide = (
        make_adapter(base, tmp_path / name, seed, **settings)
        for seed, (name, settings) in enumerate(
            zip(
                ("one", "two", "wide"),
                (*SETTINGS["llama"], {"r": 9, "target_modules": ["q_proj"]}),
                strict=True,
            )
        )
    )
    face = QEffAutoPeftModelForCausalLM.from_pretrained(one, "one", adapter_as_input=True)
    face.load_adapter(two, "two")
    face.compile(prefill_seq_len=4, ctx_len=24)
    place = face.qpc_path
    prompts, names = ["abcdefgh", "badc", "abcdefgh", "abcdefgh"], ["two", "base", "one", "two"]
    models = {"one": merged_by_peft(base, one), "two": merged_by_peft(base, two)}
    models["base"] = eager(base)
    result = face.generate(tokenizer, prompts, prompt_to_adapter_mapping=names, generation_len=9)
    for prompt, name, row in zip(prompts, names, result.generated_ids, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = models[name].generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert row.tolist() == made[0, ids.shape[1] :].tolist()
    assert face.qpc_path == place
    assert face.active_adapter == "one"
    face.set_adapter("base")
    ids = torch.tensor([IDS])
    plain = face.generate(inputs={"input_ids": ids}, max_new_tokens=NEW).generated_ids[0]
    assert plain.tolist() == expected(eager(base))[0]
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight in .*wide.* the export has r"):
        face.load_adapter(wide, "wide")
    several = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    found = face.generate(tokenizer, prompts, prompt_to_adapter_mapping=names, **several)
    rows = []
    for prompt, name in zip(prompts, names, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = models[name].generate(ids, do_sample=False, pad_token_id=0, **several)
        rows += made[:, ids.shape[1] :].tolist()
    assert found.generated_ids.tolist() == rows
    with pytest.raises(UsageError, match="an adapter runs alone, and adapters= names more"):
        QEffAutoPeftModelForCausalLM.from_pretrained(
            one, adapters={two: 0.5}, adapter_as_input=True
        )


def test_names_are_those_of_the_adapters_that_an_export_was_made_with(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, hooks = bases["llama"], Plugins.discover().hooks_for("llama")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    first, second = (
        make_adapter(base, tmp_path / run / "style", seed, target_modules=["q_proj"], r=2)
        for seed, run in enumerate(("run1", "run2"))
    )

    def exported(*adapters: Path) -> Any:
        loaded = load_model(str(base), adapters=adapters, adapter_as_input=True)
        return export_model(loaded, hooks)

    one, other = exported(first), exported(second)
    assert one.folder != other.folder
    assert with_adapter(other, ["style"]).adapter_name == str(second)
    assert with_adapter(one, ["style"]).adapter_name == str(first)
    with pytest.raises(UsageError, match=r"style is the name of .*run1.* and of .*run2"):
        with_adapter(exported(first, second), ["style"])
    settings = json.loads((second / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "org/another-model"
    (second / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"was made for another-model, and is used with .*llama"):
        with_adapter(one, [str(second)])


def test_what_cannot_be_an_input_is_named(
    made: tuple[Path, list[Path], Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base, (one, two), export = made
    tensors = load_file(one / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    other = re.escape(key.replace("lora_A", "lora_B"))

    def changed(name: str, **new: torch.Tensor | None) -> Path:
        copy = Path(shutil.copytree(one, tmp_path / name))
        kept = {**tensors, **new}
        kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
        save_file(kept, copy / "adapter_model.safetensors")
        return copy

    with pytest.raises(CheckpointError, match=rf"{other} in .* lacks its other half"):
        with_adapter(export, changed("half", **{key: None}))
    with pytest.raises(CheckpointError, match=r"is of rank 3, unlike adapter_config.json"):
        with_adapter(export, changed("rank", **{key: tensors[key][:3].clone()}))
    with pytest.raises(CheckpointError, match=r"elements that are not finite"):
        with_adapter(export, changed("nan", **{key: tensors[key] * float("nan")}))
    pair = dict.fromkeys((key, key.replace("lora_A", "lora_B")))
    with pytest.raises(CheckpointError, match=r"is missing, though adapter_config.json names it"):
        with_adapter(export, changed("gone", **pair))
    with pytest.raises(CheckpointError, match=r"no adapter is named three: .*"):
        with_adapter(export, "three")
    with pytest.raises(UsageError, match="one adapter at a time"):
        with_adapter(export, [one, two])
    with pytest.raises(UsageError, match="but none is given"):
        load_model(str(base), adapter_as_input=True)
    heads = make_adapter(base, tmp_path / "heads", target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.* the export has no input for|base_layer"):
        with_adapter(export, heads)
    name = "llama" if base.name == "gpt2" else "gpt2"
    with pytest.warns(UserWarning, match="was made for"):
        stranger = load_model(str(bases[name]), adapters=[one], adapter_as_input=True)
    with pytest.raises(CheckpointError, match=r"an adapter is for .*, which \w+ does not have"):
        stranger.model  # noqa: B018
    saved = make_adapter(
        base,
        tmp_path / "saved",
        target_modules=SETTINGS[base.name][0]["target_modules"],
        modules_to_save=["lm_head"],
    )
    with pytest.raises(CheckpointError, match=r"lm_head.* is no A or B of LoRA on a linear module"):
        load_model(str(base), adapters=[saved], adapter_as_input=True)


def test_an_export_without_places_and_a_model_of_another_kind_take_none(
    made: tuple[Path, list[Path], Any],
    demo_export: Path,
    make_model: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, (one, _), _ = made
    assert main(["generate", str(demo_export), "a", "--adapter", str(one)]) != 0
    assert "takes no adapters as inputs" in capsys.readouterr().err
    bert = tmp_path / "bert"
    make_model("bert").base_model.save_pretrained(bert)
    model = load_model(str(bert), task="embedding").model
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "one")
    loaded = load_model(
        str(bert), task="embedding", adapters=[tmp_path / "one"], adapter_as_input=True
    )
    hooks = Plugins.discover().hooks_for("bert", task="embedding")
    with pytest.raises(UnsupportedModelError, match="inputs of causal LMs, not of a"):
        export_model(loaded, hooks, output=tmp_path / "export")
    assert not (tmp_path / "export").exists()
