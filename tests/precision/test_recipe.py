"""Recipes: what the search finds, what backends make of it, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.backends.recipe import (
    OPTION,
    Recipe,
    check_recipe,
    identity_of,
    name_units_of,
    read_recipe,
    write_nodes,
)
from qeff_proxy.backends.registry import BUILTIN_BACKENDS
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.export.repeat.mark_layers import NotRepeatable
from qeff_proxy.graph.modules import unit_of
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.precision.make_recipe import make_recipe
from qeff_proxy.precision.prepare import Prepared, prepare
from qeff_proxy.precision.search import Goal, search
from qeff_proxy.request import Request
from qeff_proxy.verify.by_layer import verify_layers
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

IDS = np.arange(3, 43)[None] * 3 % 131
REQUEST = Request(inputs={"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
WEAK = ("model.layers.1.self_attn.o_proj", "model.layers.4.mlp.down_proj")


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    """A Llama with two products that 4 bits are too few for: a huge element in each block.

    It multiplies a small input, so that the model computes what it did.
    """
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model = make_model("llama", layers=6)
    with torch.no_grad():
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[4].mlp
        attention.o_proj.weight[:, ::16] *= 40  # four heads of 16, which share two values
        attention.v_proj.weight[::16] /= 40
        mlp.down_proj.weight[:, ::32] *= 40
        mlp.up_proj.weight[::32] /= 40
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(checkpoint):
    return make_recipe(str(checkpoint), "onnxruntime", "int4", Goal(most_wide=0.1), REQUEST)


@pytest.fixture
def file(made, tmp_path) -> Path:
    made.recipe.write(tmp_path / "recipe.toml")
    return tmp_path / "recipe.toml"


def prepared(checkpoint: Path, backend: str, precision: str) -> Prepared:
    return prepare(
        str(checkpoint), backend, precision, REQUEST, None, None,
        trust_remote_code=False, progress=lambda _stage: None,
    )  # fmt: skip


def test_the_weak_modules_are_found_and_proven(made):
    assert set(WEAK) <= set(made.recipe.wide)
    assert made.found.share <= 0.1
    assert made.reached
    assert made.after.sqnr > made.before.sqnr + 2
    # int4 is no simulation: the backend's numbers are the search's.
    assert made.before.sqnr == pytest.approx(made.found.low.sqnr, abs=0.3)
    assert made.after.sqnr == pytest.approx(made.found.distance.sqnr, abs=0.3)


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "int4"), ("qnn", "a8w8")])
def test_the_search_is_within_a_decibel_of_exhaustive(checkpoint, backend, precision):
    """Of all sets of the nine units of two layers that lose most alone.

    In a8w8 there are sums among them, which gain nothing without their neighbours.
    """
    variants = prepared(checkpoint, backend, precision).variants
    names = sorted(name for name in variants.units if ".1." in name or ".4" in name)
    alone = variants.measure([{name} for name in names])
    kept = [name for _, name in sorted(zip(alone, names, strict=True), key=lambda p: p[0].sqnr)][:9]
    variants.units = {name: variants.units[name] for name in kept}
    found = search(variants, Goal(most_wide=0.06), lambda _stage: None)
    sets = [
        set(some) for size in range(10) for some in itertools.combinations(kept, size)
        if variants.share(set(some)) <= 0.06
    ]  # fmt: skip
    best = max(one.sqnr for one in variants.measure([set(kept) - some for some in sets]))
    assert len(sets) > 20
    assert best - 0.15 <= found.distance.sqnr <= best + 0.05
    assert found.recovered == pytest.approx(
        1 - 10 ** ((found.low.sqnr - found.distance.sqnr) / 10), rel=1e-6
    )


def test_a_target_is_reached_with_no_unit_too_many(checkpoint, made):
    target = made.found.low.sqnr + 3
    result = make_recipe(
        str(checkpoint), "onnxruntime", "int4", Goal(sqnr=target), REQUEST, prove=False
    )
    assert result.reached
    assert result.found.distance.sqnr >= target
    ready = prepared(checkpoint, "onnxruntime", "int4")
    every, wide = set(ready.variants.units), set(result.recipe.wide)
    fewer = ready.variants.measure([every - (wide - {one}) for one in wide])
    assert all(one.sqnr < target for one in fewer)


def test_a_target_out_of_reach_writes_nothing(demo_checkpoint, tmp_path, capsys):
    """With everything wide, the backend still rounds as float32 does; nothing is searched then."""
    command = ["recipe", str(demo_checkpoint), "--precision", "int8", "--target-sqnr", "200"]
    place = ["--write", str(tmp_path / "r.toml"), "--nodes", str(tmp_path / "nodes")]
    assert main([*command, *place]) == 1
    said = capsys.readouterr().out
    assert "It does not reach the goal, and was not written." in said
    assert "Everything is wide: no module is left in int8." in said
    assert main([*command, *place, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["found"]["measured"] == 2
    assert not (tmp_path / "r.toml").exists()
    assert not (tmp_path / "nodes").exists()


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_mixture_that_a_compiler_refuses_is_searched_anew_greedily(
    checkpoint, refusals, monkeypatch
):
    refused: list[Path] = []

    class Picky(OnnxRuntimeBackend):
        def open(self, export, part, options, folder):
            if OPTION in options.backend and len(refused) < refusals:
                refused.append(folder)
                raise BackendError("this mixture is refused")
            return super().open(export, part, options, folder)

    module = ModuleType("picky_recipe_backend")
    module.Picky = Picky
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(BUILTIN_BACKENDS, "onnxruntime", f"{module.__name__}:Picky")
    greedily = []

    def spied(*args, greedy):
        greedily.append(greedy)
        return search(*args, greedy=greedy)

    searched = sys.modules["qeff_proxy.precision.make_recipe"]  # the package's name is a function
    monkeypatch.setattr(searched, "search", spied)
    goal = Goal(most_wide=0.03)
    if refusals == 1:
        result = make_recipe(str(checkpoint), "onnxruntime", "int4", goal, REQUEST)
        assert result.reached
        assert result.after.sqnr > result.before.sqnr
    else:
        with pytest.raises(BackendError, match="this mixture is refused"):
            make_recipe(str(checkpoint), "onnxruntime", "int4", goal, REQUEST)
    assert len(refused) == refusals
    assert greedily == [False, True]


def test_overflow_is_found_whatever_else_overflows(make_model, tmp_path):
    model = make_model("llama", layers=5)
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].mlp.up_proj.weight *= 3e5
            model.model.layers[layer].mlp.down_proj.weight /= 3e5
    model.save_pretrained(tmp_path / "llama")
    result = make_recipe(
        str(tmp_path / "llama"), "qaic", "fp16", Goal(sqnr=40), REQUEST, prove=False
    )
    assert result.found.low.sqnr == -math.inf
    assert result.found.distance.sqnr >= 40
    assert {path.split(".")[2] for path in result.recipe.wide} == {"1", "3"}


def test_the_file(made, file):
    assert read_recipe(file) == made.recipe
    assert read_recipe(file).measured["backend_db"] == pytest.approx(made.after.sqnr, rel=1e-4)


def products(folder: Path, kind: str) -> list[str]:
    """The units of a compiled part's products, of MatMul and Gemm or of MatMulNBits."""
    nodes = ir.load(folder / "body.prepared.onnx").graph
    return [str(unit_of(node)) for node in nodes if node.op_type in kind.split()]


def compiled(export, path: Path) -> Path:
    backend = {"weights": "int4", "recipe": str(path), "save_optimized": False}
    return compile_export(export, "onnxruntime", CompileOptions(backend=backend)).folder


@pytest.mark.parametrize("how", ["opset 18", "opset 22", "traced whole", "without taps"])
def test_it_fits_every_export_of_the_model(checkpoint, file, how, monkeypatch, tmp_path):
    """Names of nodes differ; the same modules stay wide."""
    if how == "traced whole":

        def refuse(*_args, **_more):
            raise NotRepeatable("each layer is traced")

        monkeypatch.setattr("qeff_proxy.export.model_graphs.marked_layers", refuse)
    loaded = load_model(str(checkpoint))
    export = export_model(
        loaded,
        Plugins.discover().hooks_for(loaded.model_type),
        output=tmp_path / "export",
        opset=int(how[6:]) if how.startswith("opset") else None,
        taps=() if how == "without taps" else "layers",
    )
    folder = compiled(export, file)
    assert set(products(folder, "MatMul Gemm")) >= set(WEAK)
    assert not set(WEAK) & set(products(folder, "MatMulNBits"))
    assert len(products(folder, "MatMulNBits")) == 6 * 7 - len(read_recipe(file).wide)


def test_compile_and_verify_obey_it(checkpoint, made, file, capsys):
    ids = ",".join(map(str, IDS[0]))
    command = ["verify", str(checkpoint), "--ids", ids, "--max-new-tokens", "2", "--json"]
    weights = ["-O", "onnxruntime.weights=int4"]
    found = []
    for recipe in ([], ["--recipe", str(file)]):
        main([*command, *weights, *recipe])
        report = json.loads(capsys.readouterr().out)
        found.append(report["backends"][0]["sqnr"])
    assert found[1] > found[0] + 1
    options = {"weights": "int4", "recipe": str(file)}
    layers = [
        verify_layers(
            str(checkpoint), request=REQUEST,
            options=VerifyOptions(max_new_tokens=1, backends={"onnxruntime": chosen}),
        ).results[0].layers
        for chosen in ({"weights": "int4"}, options)
    ]  # fmt: skip
    weak = [layer.layer for layer in layers[0] if layer.part == "body"]
    gains = [
        one.local.sqnr - other.local.sqnr for one, other in zip(layers[1], layers[0], strict=True)
        if one.part == "body"
    ]  # fmt: skip
    assert {weak[at] for at in np.argsort(gains)[-2:]} == {1, 4}


def test_another_recipe_compiles_anew_and_the_same_is_a_lookup(made, file, tmp_path):
    export = made.export
    one = compiled(export, file)
    elsewhere = tmp_path / "copy.toml"
    elsewhere.write_text(file.read_text())
    assert compiled(export, elsewhere) == one
    replace(made.recipe, wide=WEAK[:1]).write(elsewhere)
    assert compiled(export, elsewhere) != one


def test_a_whole_layer_can_be_named(made, tmp_path):
    replace(made.recipe, wide=("model.layers.2",)).write(tmp_path / "r.toml")
    folder = compiled(made.export, tmp_path / "r.toml")
    wide = products(folder, "MatMul Gemm")
    assert sum(unit.startswith("model.layers.2.") for unit in wide if "_proj" in unit) == 7


def test_nodes_for_other_tools(made, tmp_path):
    export = made.export
    model = ir.load(export.folder / "body.onnx")
    name_units_of(model, export, export.part("body"))
    wide = [node for node in model.graph if unit_of(node) in made.recipe.wide]
    write_nodes(made.recipe, export, "onnxruntime", tmp_path / "ort")
    excluded = json.loads((tmp_path / "ort" / "body.nodes.json").read_text())
    assert excluded["nodes_to_exclude"] == [node.name for node in wide]
    write_nodes(made.recipe, export, "qaic", tmp_path / "qaic")
    lines = (tmp_path / "qaic" / "body.fp32.yaml").read_text().splitlines()
    assert lines[0] == "FP32NodeInstanceNames:"
    assert [json.loads(line[4:]) for line in lines[1:]] == [
        value.name for node in wide for value in node.outputs
    ]
    write_nodes(made.recipe, export, "qnn", tmp_path / "qnn")
    found = json.loads((tmp_path / "qnn" / "body.encodings.json").read_text())
    assert set(found["param_encodings"]) == {f"{path}.weight" for path in made.recipe.wide}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wide": ("model.layers.9.mlp",)}, "names model.layers.9.mlp, which"),
        ({"wide": ("model.layers.1:Conv",)}, "names model.layers.1:Conv, which"),
        ({"identity": "0" * 64}, "has other weights"),
        ({"precision": "int8"}, "is for int8 of onnxruntime, and the options say otherwise"),
        ({"precision": "a8w8", "backend": "qnn"}, "is for a8w8 of qnn, which onnxruntime lacks"),
        ({"precision": "int44"}, "is for int44 of onnxruntime, which onnxruntime lacks"),
    ],
)
def test_a_recipe_that_does_not_fit_compiles_nothing(made, tmp_path, change, said, capsys):
    path = tmp_path / "r.toml"
    replace(made.recipe, **change).write(path)
    before = set((made.export.folder / "compiled").iterdir())
    command = [str(made.export.folder), "--recipe", str(path), "-O"]
    assert main(["compile", *command, "weights=int4"]) == 2
    assert said in capsys.readouterr().err
    assert main(["verify", *command, "onnxruntime.weights=int4"]) == 2
    assert said in capsys.readouterr().err
    assert set((made.export.folder / "compiled").iterdir()) == before


def test_another_model_is_told_from_this_one(checkpoint, made, make_model, tmp_path):
    make_model("llama", layers=5).save_pretrained(tmp_path / "llama")
    loaded = load_model(str(tmp_path / "llama"))
    other = export_model(
        loaded, Plugins.discover().hooks_for(loaded.model_type), output=tmp_path / "export"
    )
    assert identity_of(other) != identity_of(made.export)
    made.recipe.write(tmp_path / "r.toml")
    options = {"weights": "int4", "recipe": str(tmp_path / "r.toml")}
    with pytest.raises(UsageError, match="has other weights"):
        check_recipe(other, "onnxruntime", CompileOptions(backend=options))


@pytest.mark.parametrize(
    "content",
    ["", "schema = 2", "schema = 1\nwide = 3", "= 1", "\xff", "a = " + "[" * 9999 + "]" * 9999],
)
def test_a_damaged_file(content, tmp_path):
    (tmp_path / "r.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"r\.toml is no recipe"):
        read_recipe(tmp_path / "r.toml")


def test_what_is_refused(made, file, checkpoint, capsys, tmp_path):
    export = str(made.export.folder)
    cases = [
        (["compile", export, "--backend", "torch", "--recipe", str(file)], "cannot obey a recipe"),
        (["compile", export, "--recipe", str(file)], "all weights do"),
        (["compile", export, "--recipe", str(tmp_path / "none.toml")], "cannot be read"),
        (["verify", export, "--backend", "torch", "--recipe", str(file)], "'torch' cannot"),
        (["score", export, "--text", str(file), "--recipe", str(file)], "all weights do"),
        (["compile", export, "--backend", "openvino", "--recipe", str(file)], "openvino lacks"),
    ]
    place = tmp_path / "export"
    for command in ("compile", "generate", "verify"):  # before anything is exported
        given = ["1,2", "--ids"] if command == "generate" else []
        given += ["--output", str(place), "--recipe", str(file)]
        cases.append(([command, str(checkpoint), *given], "all weights do"))
    for command in ("sensitivity", "recipe"):  # at once: there is no such model
        goal = ["--same-tokens"] if command == "recipe" else []
        cases.append(([command, "/no/model", "--precision", "int9", *goal], "It has: int8, int4."))
    search = ["recipe", str(checkpoint), "--precision", "int4"]
    cases += [
        ([*search], "one of the arguments"),
        ([*search, "--max-wide", "0%"], "a share is above 0%"),
        ([*search, "--max-wide", "much"], "'much' is no number"),
        ([*search, "--target-sqnr", "nan"], "'nan' is no number"),
        ([*search, "--same-tokens", "--write", str(tmp_path)], "is a folder"),
        ([*search, "--same-tokens", "--nodes", str(file)], "is a file"),
        ([*search, "--target-sqnr", "9", "--same-tokens"], "not allowed with"),
        ([*search, "--same-tokens", "--write", str(tmp_path / "no" / "r.toml")], "no folder"),
    ]  # fmt: skip
    for command, said in cases:
        assert main(command) == 2, command
        assert said in capsys.readouterr().err
    assert not place.exists()


def test_names_with_quotes_survive(tmp_path):
    recipe = Recipe('a "b"\\c', "0", "x", "int8", ('m."q"', "n\u00fc"), {"one": 1.5})
    recipe.write(tmp_path / "r.toml")
    assert read_recipe(tmp_path / "r.toml") == recipe
