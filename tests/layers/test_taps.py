"""What the layers give, as extra outputs; a wrong bit in a layer is found by its number."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.hashes import hash_weights_file
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.cli import main
from qeff_proxy.compare import Tolerances, compare_dumps
from qeff_proxy.compare.verdict import describe_verdict
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.cut.cut_model import cut_model
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.export.cache_key import export_key
from qeff_proxy.export.export_model import export_model
from qeff_proxy.layers.layer_lists import find_layer_list
from qeff_proxy.layers.taps import TappedPart, normalize_taps, tap_proxy
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.parts import Part, Proxy, TensorSpec
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from torch import nn

HOOKS = Plugins.discover().hooks_for("gpt2")
ALL = ("layers", "attention", "mlp")
LAYERS = 4
IDS = np.random.default_rng(3).integers(3, 131, (1, 7))


@pytest.fixture(scope="module")
def exports(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One GPT-2 of four layers: exported with every tap, with layers only, and plain."""
    root = tmp_path_factory.mktemp("exports")
    model = make_model("gpt2", n_layer=LAYERS, num_hidden_layers=LAYERS)
    model.save_pretrained(root / "checkpoint")
    given = ["--taps", "layers,attention,mlp", "--output", str(root / "all"), "--json"]
    assert main(["export", str(root / "checkpoint"), *given]) == 0
    QEFFAutoModelForCausalLM(model, proxy="split").export(root / "layers", taps="layers")
    export_model(wrap_model(model), HOOKS, output=root / "plain")
    return {name: root / name for name in ("all", "layers", "plain")}


def dump_of(export: Path, folder: Path) -> Path:
    """Run an export on ONNX Runtime for a prefill and two decode steps."""
    run_compiled(
        compile_export(read_export(export), options=CompileOptions(num_cores=1)),
        HOOKS,
        Request(inputs={"input_ids": IDS}),
        settings={"max_new_tokens": 3, "do_sample": False},
        write_io=True,
        io_folder=folder,
    )
    return folder


class AsPart(nn.Module):
    """A whole model as a part's module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(input_ids=input_ids).logits}


def tapped_run(model: Any, taps: Any = ALL, depth: int = 2) -> dict[str, torch.Tensor]:
    layers = find_layer_list(model, depth)
    assert layers is not None
    with torch.no_grad():
        return TappedPart(AsPart(model), layers.layers, taps)(input_ids=torch.from_numpy(IDS))


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "opt", "bloom", "mpt", "mixtral", "qwen3_moe", "gpt_oss"]
)
def test_a_layers_tap_is_the_hidden_state_that_transformers_gives(
    model_type: str, make_model: Any
) -> None:
    model = make_model(model_type)
    seen = tapped_run(model)
    with torch.no_grad():
        states = model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states
    assert torch.equal(seen["hidden_states.0"], states[1])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "mixtral", "gpt_neox", "falcon"])
def test_attention_and_mlp_are_what_a_layer_adds(model_type: str, make_model: Any) -> None:
    seen = tapped_run(make_model(model_type))
    added = seen["hidden_states.1.attention"] + seen["hidden_states.1.mlp"]
    expected = seen["hidden_states.1"] - seen["hidden_states.0"]
    assert expected.abs().max() > 0.1
    assert torch.allclose(added, expected, atol=1e-5)


def test_the_graph_without_taps_is_the_one_it_was(exports: dict[str, Path]) -> None:
    """With taps cut off again, the graphs have the same nodes; without any, nothing is touched."""
    plain, tapped = (
        onnx.load(exports[name] / "body.onnx", load_external_data=False).graph
        for name in ("plain", "all")
    )
    assert not any("hidden_states." in value.name for value in plain.output)
    own = [value.name for value in plain.output]
    assert [value.name for value in tapped.output][: len(own)] == own
    assert len(tapped.output) == len(own) + 3 * LAYERS
    counts = [
        sorted(node.op_type for node in graph.node if node.op_type != "Identity")
        for graph in (plain, tapped)
    ]
    assert counts[0] == counts[1]
    proxy = cut_of(nn.Identity())
    assert tap_proxy(proxy, ()) is proxy


def test_taps_are_part_of_what_an_export_is(exports: dict[str, Path], saved_gpt2: Path) -> None:
    assert read_export(exports["all"]).settings["taps"] == list(ALL)
    assert "taps" not in read_export(exports["plain"]).settings
    loaded = load_model(str(saved_gpt2))
    keys = [
        export_key(loaded, HOOKS, "split", None, taps) for taps in ((), ("layers",), ("mlp",), ALL)
    ]
    assert len({json.dumps(key) for key in keys}) == 4
    assert read_export(exports["layers"]).made_by["taps"] == ["layers"]


def test_a_dump_holds_every_layer_by_its_number(exports: dict[str, Path], tmp_path: Path) -> None:
    dump = read_dump(dump_of(exports["all"], tmp_path / "all"))
    for layer in range(LAYERS):
        for kind in ("", "_attention", "_mlp"):
            name = f"body.out.hidden_states{kind}.layer-{layer:02d}"
            assert (tmp_path / "all" / "decode" / f"{name}.npy").is_file()
            assert dump.array("prefill", 0, name).shape == (1, 7, 64)
            assert dump.array("decode", 1, name).shape == (1, 1, 64)
    before, attention, mlp, after = (
        dump.array("decode", 1, f"body.out.hidden_states{name}")
        for name in (".layer-02", "_attention.layer-03", "_mlp.layer-03", ".layer-03")
    )
    assert np.allclose(before + attention + mlp, after, atol=1e-5)


def test_taps_change_nothing_else(exports: dict[str, Path], tmp_path: Path) -> None:
    for name in ("plain", "layers", "all"):
        dump_of(exports[name], tmp_path / name)
    for name in ("layers", "all"):
        found = compare_dumps(tmp_path / "plain", tmp_path / name, partial=True)
        assert found.passed
        assert len(found.tensors) >= 2 * (2 * LAYERS + 3)
    assert compare_dumps(tmp_path / "layers", tmp_path / "all", partial=True).passed


def test_the_torch_backend_gives_the_same_taps(exports: dict[str, Path], tmp_path: Path) -> None:
    reference = tmp_path / "torch"
    run_compiled(
        compile_export(read_export(exports["all"]), "torch"),
        HOOKS,
        Request(inputs={"input_ids": IDS}),
        settings={"max_new_tokens": 3, "do_sample": False},
        write_io=True,
        io_folder=reference,
    )
    found = compare_dumps(reference, dump_of(exports["all"], tmp_path / "ort"))
    assert found.passed
    assert {str(t.name) for t in found.tensors} >= {"body.out.hidden_states_mlp.layer-03"}


# Which weight of a layer is wrong, and the first of the layer's tensors that shows it.
FAULTS = {
    "attn.c_attn.weight": "present_key",
    "attn.c_proj.weight": "hidden_states",
    "ln_2.bias": "hidden_states",
    "mlp.c_fc.weight": "hidden_states",
    "mlp.c_proj.weight": "hidden_states",
}


def flip_bit(export: Path, weight: str, bit: int) -> None:
    """Flip one bit of the element in the middle of a weight's first row (of keys, in attention)."""
    path = export / "body.safetensors"
    place = read_header(path)[weight]
    element = 64 + 20 if "c_attn" in weight else 20
    with path.open("r+b") as file:
        file.seek(place.offset + 4 * element)
        bits = np.frombuffer(file.read(4), "<u4") ^ (1 << bit)
        file.seek(place.offset + 4 * element)
        file.write(bits.astype("<u4").tobytes())
    # As if the fault had been there when it was exported: a changed file would be refused.
    manifest = json.loads((export / "export.json").read_text())
    manifest["hashes"][path.name] = hash_weights_file(path)
    (export / "export.json").write_text(json.dumps(manifest))


def faulty(export: Path, folder: Path, layer: int, weight: str, bit: int) -> Path:
    """A dump of a copy of the export in which one bit of one weight of a layer is flipped."""
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("compiled", "io"))
    flip_bit(folder, f"transformer.h.{layer}.{weight}", bit)
    return dump_of(folder, folder / "io" / "faulty")


@pytest.fixture(scope="module")
def good(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dump of each of the sound exports."""
    root = tmp_path_factory.mktemp("good")
    return {name: dump_of(exports[name], root / name) for name in exports}


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("weight", FAULTS)
def test_a_wrong_bit_in_a_layer_is_found_by_its_number(
    layer: int, weight: str, exports: dict[str, Path], good: dict[str, Path], tmp_path: Path
) -> None:
    bad = faulty(exports["layers"], tmp_path / "bad", layer, weight, bit=25)  # of the exponent
    first = compare_dumps(good["layers"], bad).first_divergence
    assert first is not None
    assert first.layer == layer
    assert first.tensor == f"body.out.{FAULTS[weight]}.layer-{layer:02d}"
    assert first.step == "prefill-0000"
    assert not first.is_input


@pytest.mark.parametrize(("layer", "weight"), [(0, "mlp.c_fc.weight"), (3, "attn.c_proj.weight")])
def test_a_wrong_bit_too_small_for_a_tolerance_is_found_by_exact_comparison(
    layer: int, weight: str, exports: dict[str, Path], good: dict[str, Path], tmp_path: Path
) -> None:
    bad = faulty(exports["layers"], tmp_path / "bad", layer, weight, bit=9)  # of the mantissa
    tolerant = compare_dumps(good["layers"], bad)
    assert tolerant.passed
    assert tolerant.origin is not None  # what differs, within tolerance, after all that is equal
    assert tolerant.origin.layer == layer
    first = compare_dumps(
        good["layers"], bad, tolerances=Tolerances.parse(["*=atol:0"])
    ).first_divergence
    assert first is not None
    assert first.layer == layer


def test_without_taps_the_caches_tell_the_layer_or_the_next(
    exports: dict[str, Path], good: dict[str, Path], tmp_path: Path
) -> None:
    """What docs/compare.md says: the cache of a layer shows its attention's input only."""

    def first(layer: int, weight: str) -> tuple[str, int | None, str]:
        folder = tmp_path / f"{layer}-{weight}"
        bad = faulty(exports["plain"], folder, layer, weight, bit=25)
        comparison = compare_dumps(good["plain"], bad)
        found = comparison.first_divergence
        assert found is not None
        (hint,) = [line for line in describe_verdict(comparison) if "--taps layers" in line]
        return found.tensor, found.layer, hint.partition("may also be in ")[2].partition(":")[0]

    key = "body.out.present_key.layer-0"
    after = "after its keys and values"
    assert first(2, "attn.c_attn.weight") == (f"{key}2", 2, f"layer 1, {after}")
    assert first(2, "mlp.c_fc.weight") == (f"{key}3", 3, f"layer 2, {after}")
    last = first(LAYERS - 1, "mlp.c_fc.weight")
    assert last == ("body.out.last_hidden_state", None, "the last layer")


def test_attention_and_mlp_taps_tell_them_apart(
    exports: dict[str, Path], good: dict[str, Path], tmp_path: Path
) -> None:
    for weight, tensor in (("attn.c_proj.weight", "attention"), ("mlp.c_proj.weight", "mlp")):
        bad = faulty(exports["all"], tmp_path / tensor, 1, weight, bit=25)
        first = compare_dumps(good["all"], bad).first_divergence
        assert first is not None
        assert first.tensor == f"body.out.hidden_states_{tensor}.layer-01"


def test_the_uncut_model_has_taps_too(make_model: Any) -> None:
    cut = cut_model(wrap_model(make_model("llama")), HOOKS, "whole", verify=False)
    names = [spec.name for spec in tap_proxy(cut.proxy, ALL).part("model").outputs]
    assert names[-3:] == ["hidden_states.1.attention", "hidden_states.1.mlp", "hidden_states.1"]


def test_the_trace_names_the_axes_of_taps(exports: dict[str, Path]) -> None:
    outputs = read_export(exports["all"]).part("body").outputs
    shapes = {spec.shape for spec in outputs if "hidden_states." in spec.name}
    assert shapes == {("batch", "query", 64)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self.lin(x)


class Looped(nn.Module):
    """Two layers that run twice; each result is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.fails = False

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for _ in range(2):
            for block in self.blocks:
                _, x = block(x)
                x.mul_(2)
        if self.fails:
            raise RuntimeError("on purpose")
        return {"y": x}


def cut_of(module: nn.Module, outputs: tuple[str, ...] = ("y",)) -> Proxy:
    specs = tuple(TensorSpec(name, "float32", ("batch", 4)) for name in outputs)
    part = Part("body", module, (TensorSpec("x", "float32", ("batch", 4)),), specs, "body")
    return Proxy("split", "causal-lm", (part,))


def test_a_layer_that_runs_twice_has_two_numbers_and_keeps_its_values() -> None:
    module = Looped()
    part = tap_proxy(cut_of(module), ("layers",)).parts[0]
    assert [spec.name for spec in part.outputs] == ["y", *(f"hidden_states.{n}" for n in range(4))]
    with torch.no_grad():
        seen = part.module(x=torch.ones(2, 4))
    for n in range(3):
        _, expected = module.blocks[(n + 1) % 2](2 * seen[f"hidden_states.{n}"])
        assert torch.equal(seen[f"hidden_states.{n + 1}"], expected)
    assert torch.equal(seen["y"], 2 * seen["hidden_states.3"])


def test_no_hook_stays_even_when_the_model_fails() -> None:
    module = Looped()
    tapped = TappedPart(module, tuple(module.blocks), ("layers",))
    tapped(x=torch.ones(2, 4))
    module.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        tapped(x=torch.ones(2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_part_without_layers_is_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no part has layers.*without taps"):
        tap_proxy(cut_of(nn.Linear(4, 4)), ("layers",))
    cached = cut_of(nn.Linear(4, 4), ("y", "present.0.key", "present.0.value"))
    with pytest.raises(UnsupportedModelError, match="layers of the body part cannot be found"):
        tap_proxy(cached, ("layers",))
    with pytest.raises(UnsupportedModelError, match=r"no attention can be found.*Layer\)"):
        tap_proxy(cut_of(Looped()), ("layers", "attention"))


def test_kinds_that_no_layer_has_are_left_out_and_named() -> None:
    tapped = tap_proxy(cut_of(Looped()), ("layers", "q", "up", "gate"))
    assert tapped.settings["absent_taps"] == ["q", "gate"]
    names = [spec.name for spec in tapped.parts[0].outputs]
    assert "hidden_states.0" in names
    assert any(name.startswith("hidden_states.0.") for name in names)  # the first projection: up
    assert "absent_taps" not in tap_proxy(cut_of(Looped()), ("layers", "up")).settings
    for wrong in (("gate",), ("layers", "mlp.*")):
        with pytest.raises(UnsupportedModelError, match=r"no (gate|mlp\.\*) can be found"):
            tap_proxy(cut_of(Looped()), wrong)


def test_the_layers_are_the_list_as_long_as_the_cache_unless_it_is_a_small_thing() -> None:
    module = nn.Module()
    module.wide = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    module.deep = nn.ModuleList(nn.Linear(12, 12) for _ in range(5))
    module.tiny = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    for depth, path in ((3, "wide"), (5, "deep"), (4, "wide"), (0, "wide")):
        layers = find_layer_list(module, depth)
        assert layers is not None
        assert layers.path == path


def test_what_can_be_tapped_is_said(saved_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert normalize_taps("mlp, layers,mlp") == ("layers", "mlp")
    assert normalize_taps(None) == ()
    with pytest.raises(UsageError, match=r"no tap 'heads'.*layers, attention, mlp"):
        normalize_taps(["heads"])
    assert main(["export", str(saved_gpt2), "--taps", "heads"]) == 2
    assert "there is no tap 'heads'" in capsys.readouterr().err


def test_weights_of_the_vocabulary_are_no_layers(make_model: Any) -> None:
    cut = cut_model(wrap_model(make_model("gpt2")), HOOKS, "split", verify=False)
    tapped = tap_proxy(cut.proxy, ("layers",))
    assert [
        part.module is before.module
        for part, before in zip(tapped.parts, cut.proxy.parts, strict=True)
    ] == [True, False, True]
    parts = [
        dataclasses.replace(part, weights="vocabulary") if part.name == "body" else part
        for part in cut.proxy.parts
    ]
    with pytest.raises(UnsupportedModelError):
        tap_proxy(dataclasses.replace(cut.proxy, parts=tuple(parts)), ("layers",))
