"""Recipes of the ``openvino`` backend: the marks of what stays in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino
import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.recipe import Recipe, identity_of, name_units_of, write_nodes
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.graph.modules import unit_of
from qeff_proxy.testing.backend_parts import feeds_of
from qeff_proxy_npu.openvino.backend import OpenVinoBackend
from qeff_proxy_npu.openvino.marks import operations_of

pytestmark = pytest.mark.one_home

WIDE = ("transformer.h.1.mlp.c_fc", "transformer.h.2.ln_1", "transformer.h.0.attn:Softmax")
MARK = "DisablePrecisionConversion_0"


@pytest.fixture
def recipe(demo_export: Path, tmp_path: Path) -> Path:
    export = read_export(demo_export)
    path = tmp_path / "recipe.toml"
    Recipe("tiny-gpt2", identity_of(export), "openvino", "fp16", WIDE).write(path)
    return path


def marked(model: Any) -> dict[str, str]:
    """The marked operations, with their types."""
    return {
        one.get_friendly_name(): one.get_type_name()
        for one in model.get_ops()
        if MARK in dict(one.get_rt_info().items())
    }


def written(export: Export, folder: Path) -> Path:
    made = Recipe("tiny-gpt2", identity_of(export), "openvino", "fp16", WIDE)
    paths = write_nodes(made, export, "openvino", folder)
    assert [path.name for path in paths] == ["body.bin", "body.xml"]
    return folder / "body.xml"


def test_the_operations_of_the_modules_are_marked(demo_export: Path, tmp_path: Path) -> None:
    export = read_export(demo_export)
    found = marked(openvino.Core().read_model(written(export, tmp_path / "nodes")))
    assert sorted(found.values()).count("MatMul") == 1
    assert {"SoftMax", "Softmax"} & set(found.values())
    assert "MVN" in found.values() or "ReduceMean" in found.values()
    graph = ir.load(export.folder / "body.onnx")
    name_units_of(graph, export, export.part("body"))
    own = {str(node.name): unit_of(node) for node in graph.graph if unit_of(node)}
    units = {own[name] for name in found if name in own}
    assert units == set(WIDE)
    assert "transformer.h.1.mlp.c_fc.weight" in found


def test_they_survive_and_say_what_is_not_compressed(demo_export: Path, tmp_path: Path) -> None:
    """OpenVINO itself obeys them where it stores weights in float16."""
    export, core = read_export(demo_export), openvino.Core()
    model = core.read_model(written(export, tmp_path / "nodes"))
    openvino.save_model(model, tmp_path / "half.xml", compress_to_fp16=True)
    half = core.read_model(tmp_path / "half.xml")
    assert marked(model).items() <= marked(half).items()  # it marks some of its own
    kinds = {
        one.get_friendly_name().removesuffix("_compressed"): one.get_element_type().get_type_name()
        for one in half.get_ops()
        if one.get_type_name() == "Constant"
    }
    weights = {name: kind for name, kind in kinds.items() if name.endswith("c_fc.weight")}
    assert weights.pop("transformer.h.1.mlp.c_fc.weight") == "f32"
    assert set(weights.values()) == {"f16"}
    assert len(weights) >= 2


def test_the_marked_copy_computes_the_same(demo_export: Path, tmp_path: Path) -> None:
    export = read_export(demo_export)
    body = export.part("body")
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(written(export, tmp_path / "nodes")),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    feeds = feeds_of(body, query=4)
    with open_sessions(compile_export(export, "openvino")) as sessions:
        expected = sessions["body"].run(feeds)
    found = compiled(feeds)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "precision", "short"), [("fp16", "float16", "f16"), ("bf16", "bfloat16", "bf16")]
)
def test_what_is_compiled_is_marked_whatever_the_processor_makes_of_it(
    demo_export: Path, tmp_path: Path, name: str, precision: str, short: str
) -> None:
    """One that computes in float32 whatever one asks for proves nothing, and is refused."""
    export, path = read_export(demo_export), tmp_path / "recipe.toml"
    Recipe("tiny-gpt2", identity_of(export), "openvino", name, WIDE).write(path)
    options = CompileOptions(backend={"precision": precision, "recipe": str(path)})
    backend, body = OpenVinoBackend(), export.part("body")
    if name.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        backend.compile(export, body, options, tmp_path)
    else:
        said = f"would compute in f32 on this CPU, not in {short}"
        with pytest.raises(BackendError, match=said):
            compile_export(export, "openvino", options)
        with pytest.raises(BackendError, match=said):
            backend.compile(export, body, options, tmp_path)
    model = openvino.Core().read_model(tmp_path / "body.xml")
    assert "transformer.h.1.mlp.c_fc.weight" in marked(model)
    assert len(marked(model)) < len(model.get_ops()) / 10


def test_what_is_refused(demo_export: Path, recipe: Path) -> None:
    export = read_export(demo_export)
    with pytest.raises(UsageError, match="stays in float32, and everything does"):
        compile_export(export, "openvino", CompileOptions(backend={"recipe": str(recipe)}))
    other = {"recipe": str(recipe), "precision": "bfloat16"}
    with pytest.raises(UsageError, match="is for fp16 of openvino, and the options say otherwise"):
        compile_export(export, "openvino", CompileOptions(backend=other))
    strange = ir.node("Relu", [ir.Value(name="a")])
    strange.outputs[0].name = "none"
    with pytest.raises(BackendError, match="has no value none of Relu node"):
        operations_of(openvino.Core().read_model(export.folder / "body.onnx"), [strange])


def test_the_command_writes_them(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["recipe", str(demo_checkpoint), "--backend", "openvino", "--precision", "bf16"]
    place = ["--write", str(tmp_path / "r.toml"), "--nodes", str(tmp_path / "nodes")]
    assert main([*command, "--max-wide", "20%", *place, "--no-proof"]) == 0
    assert marked(openvino.Core().read_model(tmp_path / "nodes" / "body.xml"))
    assert "Nothing was proven" in capsys.readouterr().out
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        (tmp_path / "r.toml").unlink()
        assert main([*command, "--max-wide", "20%", *place]) != 0
        assert "would compute in f32 on this CPU, not in bf16" in capsys.readouterr().err
        assert not (tmp_path / "r.toml").exists()
