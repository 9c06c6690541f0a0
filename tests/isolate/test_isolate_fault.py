"""``isolate`` names the operator that a fault was put into, and no other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from operator_faults import (
    REQUEST,
    Fault,
    attribute,
    coarse,
    install_fault,
    instead,
    late,
    stale,
    then,
)
from qeff_proxy.cli import main
from qeff_proxy.errors import ArtifactError, UsageError
from qeff_proxy.graph.name_scopes import NAME_SCOPES
from qeff_proxy.isolate import (
    describe_fault,
    isolate_fault,
    read_capsule,
    run_capsule,
)
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.options import VerifyOptions
from transformers import BertConfig, BertModel

pytestmark = pytest.mark.one_home

OPTIONS = VerifyOptions(max_new_tokens=1)
LAYER = ".3"
ATTENTION, MLP = "layers.3.self_attn", "layers.3.mlp"


def isolate(folder: Path, **more: Any) -> Any:
    return isolate_fault(str(folder), request=REQUEST, options=OPTIONS, **more)


def names(fault: Any) -> list[list[str]]:
    return [[operator.node for operator in cause.operators] for cause in fault.causes]


def test_a_healthy_model_is_not_accused(checkpoint):
    fault = isolate(checkpoint)
    said = describe_fault(fault)
    assert fault.healthy, said
    assert not fault.causes
    assert f"layer {fault.local.tensor[-1]}, {fault.local.sqnr:.1f} dB" in said[1]
    assert 100 < fault.local.sqnr < 160
    assert f"limit {fault.local.limit}" in said[1]
    assert "rounding" in fault.local.limit


FAULTS = {
    "an axis": Fault("Softmax", ATTENTION, attribute("axis", 2)),
    "a mask": Fault("Add", ATTENTION, instead(0), nth=2),
    "rotary": Fault("Neg", ATTENTION, instead(0)),
    "coarse rounding": Fault("Sigmoid", MLP, coarse(2)),
    "a stale row of the cache": Fault("Concat", ATTENTION, stale(), nth=2),
    "positions late by one": Fault("Concat", ATTENTION, late(), nth=3),
    "an epsilon": Fault("Add", "layers.3.input_layernorm", then(("Add", [np.float32(0.3)]))),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_faulty_operator_is_named(kind, checkpoint, with_fault):
    edit = FAULTS[kind]
    with_fault(edit)
    fault = isolate(checkpoint)
    assert fault.where == "body layer 3"
    assert names(fault) == [[edit.name]], describe_fault(fault)
    (cause,) = fault.causes
    assert cause.shown == 5
    assert cause.remaining < 1e-5 < cause.error  # that it is the cause, and nothing else is
    assert fault.before.sqnr < 60 < fault.after.sqnr
    assert cause.operators[0].module.startswith("model.layers.3")
    assert "modeling_llama.py" in cause.operators[0].source or kind == "coarse rounding"


def test_what_was_found_before_ctrl_c_is_printed(checkpoint, with_fault, tmp_path, capsys):
    edit = FAULTS["an axis"]

    def interrupted(model: ir.Model) -> None:
        edit(model)
        if any("layers.5.mlp" in node.metadata_props.get(NAME_SCOPES, "") for node in model.graph):
            raise KeyboardInterrupt

    with_fault(interrupted)
    path = tmp_path / "fault.zip"
    command = ["isolate", str(checkpoint), "--ids", "3,10,17", "--max-new-tokens", "1"]
    assert main([*command, "--capsule", str(path)]) == 130
    said = capsys.readouterr().out
    assert edit.name in said
    assert "Interrupted at body layer 5, so there is no proof." in said
    assert read_capsule(path).facts["where"] == "body layer 3"


def test_two_faults_are_both_named(checkpoint, with_fault):
    one, two = (Fault(FAULTS[kind].operator, FAULTS[kind].module, FAULTS[kind].change)
                for kind in ("an axis", "coarse rounding"))  # fmt: skip

    def both(model: ir.Model) -> None:
        one(model)
        two(model)

    with_fault(both)
    assert sorted(names(isolate(checkpoint))) == sorted([[one.name], [two.name]])


def test_a_second_layer_that_is_out_of_line_is_said(checkpoint, with_fault):
    one = Fault("Sigmoid", "layers.1.mlp", coarse(2))
    two = Fault("Sigmoid", "layers.4.mlp", coarse(2))

    def both(model: ir.Model) -> None:
        one(model)
        two(model)

    with_fault(both)
    fault = isolate(checkpoint)
    assert names(fault) == [[one.name]]
    assert "Out of line by their own error, too: body layer 4 (see --layer)." in fault.notes


def test_operators_that_fail_only_together_are_a_group(checkpoint, with_fault):
    """A backend that fuses: its Mul is wrong only where it sees the Sigmoid before it."""
    sigmoid = Fault("Sigmoid", MLP, lambda *_: None)
    product = Fault("Mul", "layers.3.mlp.act_fn", then(("Mul", [np.float32(1.2)])))

    def fused(model: ir.Model) -> None:
        sigmoid(model)
        if sigmoid.name in [node.name for node in model.graph]:
            product(model)

    with_fault(fused)
    fault = isolate(checkpoint)
    assert names(fault) == [[sigmoid.name, product.name]]
    assert "group of 2 operators" in "\n".join(describe_fault(fault))


@pytest.mark.parametrize("healthy", [[0], [0, 2, 3], [1, 2, 4]])
def test_a_fault_that_moves_from_run_to_run_is_said(healthy, checkpoint, with_fault):
    """It shows in 4 of 5 runs, or in 2; these are counted from its layer's first."""
    runs = iter(range(1 << 30))
    edit = Fault("Sigmoid", MLP, coarse(2))

    def sometimes(model: ir.Model) -> None:
        before = edit.name
        if before is None or next(runs) % 5 not in healthy:
            edit(model)

    with_fault(sometimes)
    fault = isolate(checkpoint)
    said = "\n".join(describe_fault(fault))
    assert [[edit.name]] == names(fault), said
    (cause,) = fault.causes
    assert cause.shown == 5 - len(healthy)
    assert f"in {cause.shown} of 5 runs" in said


def test_an_operator_that_the_backend_dies_on_is_named(checkpoint, with_fault):
    edit = Fault("Softmax", ATTENTION, lambda *_: None)

    def refuse(model: ir.Model) -> None:
        edit(model)
        if edit.name in [node.name for node in model.graph]:
            raise RuntimeError("Softmax is not supported")

    with_fault(refuse)
    fault = isolate(checkpoint)
    assert names(fault) == [[edit.name]]
    assert "refuses this: RuntimeError: Softmax is not supported" in "\n".join(
        describe_fault(fault)
    )


def test_an_encoders_dropped_bias(tmp_path, with_fault):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=131, num_hidden_layers=6, max_position_embeddings=64)
    random_weights(BertModel(config).eval(), 0).save_pretrained(tmp_path / "bert")
    edit = Fault("Add", "layer.3.attention.self.query", instead(0))
    with_fault(edit)
    fault = isolate(tmp_path / "bert")
    assert names(fault) == [[edit.name]]
    assert fault.causes[0].operators[0].weights == ("encoder.layer.3.attention.self.query.bias",)


def test_a_layer_can_be_named(checkpoint, tmp_path):
    fault = isolate(checkpoint, layer="2", capsule=tmp_path / "none.zip")
    said = "\n".join(describe_fault(fault))
    assert "nothing is at fault in body layer 2" in said
    assert "Proof" not in said
    assert "No capsule was written: there is no fault to show." in said
    assert not (tmp_path / "none.zip").exists()
    assert fault.passed
    with pytest.raises(UsageError, match="no layer 'body layer 9'"):
        isolate(checkpoint, layer="body layer 9")


def test_a_fault_within_tolerance_is_named_where_one_looks(checkpoint, with_fault):
    edit = Fault("Sigmoid", MLP, coarse(16))
    with_fault(edit)
    fault = isolate(checkpoint, layer="3")
    said = "\n".join(describe_fault(fault))
    assert fault.passed, said
    assert names(fault) == [[edit.name]]
    assert f"Most of its error: Sigmoid {edit.name}" in said
    assert "Proof" not in said


@pytest.mark.filterwarnings("ignore:the body part is not shown to equal its exported graph")
def test_nan_is_called_so(checkpoint, with_fault, tmp_path):
    three = np.zeros(96, np.float32)
    three[[5, 50, 51]] = np.nan
    with_fault(Fault("Sigmoid", MLP, then(("Add", [three]))))
    fault = isolate(checkpoint, capsule=tmp_path / "fault.zip")
    said = "\n".join(describe_fault(fault))
    assert fault.local.remark in said.splitlines()[0]
    assert "NaN of" in fault.local.remark
    assert "100%" not in said
    assert "is nan instead of" in said
    assert json.loads(json.dumps(fault.to_json(), allow_nan=False))["local"]["over_peak"] is None
    with zipfile.ZipFile(tmp_path / "fault.zip") as archive:
        archive.extractall(tmp_path)
    script = [sys.executable, "-I", str(tmp_path / "run.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert "onnxruntime: not finite" in done.stdout
    assert not done.stderr


PRODUCT = Fault("MatMul", "layers.3.mlp.down_proj", coarse(0))


@pytest.fixture(scope="module")
def capsule(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("capsule") / "fault.zip"
    with pytest.MonkeyPatch.context() as patch:
        install_fault(patch, PRODUCT)
        fault = isolate(checkpoint, capsule=path)
    assert names(fault) == [[PRODUCT.name]]
    return path


def test_a_capsule_runs_elsewhere(capsule, with_fault, tmp_path):
    path = capsule
    with_fault(PRODUCT)
    assert run_capsule(path, "onnxruntime").shows
    with_fault(lambda _model: None)
    again = run_capsule(path, "onnxruntime")
    assert not again.shows
    assert again.error < 1e-6 < again.recorded
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "lab")
    script = [sys.executable, "-I", str(tmp_path / "lab" / "run.py")]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"{again.recorded:.3%}" in said
    assert "The fault does not show here." in said
    model = onnx.load(tmp_path / "lab" / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Transpose", "MatMul"]
    facts = json.loads((tmp_path / "lab" / "capsule.json").read_text())
    assert facts["where"] == "body layer 3"
    # NumPy is the oracle of what is expected.
    read = read_capsule(path)
    (weight,) = (onnx.numpy_helper.to_array(one) for one in model.graph.initializer)
    product = read.inputs["in_0"].astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(read.expected["out_0"], product, rtol=1e-4, atol=1e-5)


def test_a_capsule_without_the_models_weights(checkpoint, with_fault, tmp_path):
    edit = Fault("MatMul", "layers.3.mlp.down_proj", coarse(0))
    with_fault(edit)
    path = tmp_path / "fault.zip"
    fault = isolate(checkpoint, capsule=path, anonymous=True)
    assert fault.capsule == path
    (tensor,) = read_capsule(path).model.graph.initializer
    stored = onnx.numpy_helper.to_array(tensor)
    from safetensors.numpy import load_file

    own = load_file(checkpoint / "model.safetensors")["model.layers.3.mlp.down_proj.weight"]
    assert stored.shape == own.shape
    assert not np.isclose(stored, own).any(axis=None) or np.abs(stored - own).max() > 0.01
    assert run_capsule(path, "onnxruntime").shows


@pytest.mark.parametrize("damage", ["cut", "another", "outside", "version", "pickle", "bomb"])
def test_a_damaged_capsule_is_refused(damage, capsule, tmp_path, capsys):
    path = capsule
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    compression = zipfile.ZIP_STORED
    if damage == "another":
        del files["inputs.npz"]
    elif damage == "outside":
        files["../run.py"] = files.pop("run.py")
    elif damage == "version":
        files["capsule.json"] = json.dumps({"format": 99}).encode()
    elif damage == "pickle":
        np.savez(tmp_path / "objects.npz", in_0=np.array([{}], dtype=object))
        files["inputs.npz"] = (tmp_path / "objects.npz").read_bytes()
    elif damage == "bomb":
        files["inputs.npz"] = bytes(1 << 24)
        compression = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(bad, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:-2000])
    with pytest.raises(ArtifactError, match="no capsule that can be read"):
        run_capsule(bad, "onnxruntime")
    assert main(["isolate", str(bad)]) == 7
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command(checkpoint, with_fault, tmp_path, capsys):
    ids = ",".join(str(one) for one in REQUEST.inputs["input_ids"][0])
    command = ["isolate", str(checkpoint), "--ids", ids, "--max-new-tokens", "2"]
    assert main(command) == 0
    assert "no layer is out of line" in capsys.readouterr().out
    edit = FAULTS["coarse rounding"]
    with_fault(edit)
    path = tmp_path / "fault.zip"
    page = tmp_path / "fault.html"
    assert main([*command, "--capsule", str(path), "--html", str(page), "--json"]) == 1
    drawn = page.read_text()
    assert drawn.count("<rect") == 3  # the sigmoid, what it reads, and what reads it
    assert f"<title>{edit.name}</title>" in drawn
    report = json.loads(capsys.readouterr().out)
    assert report["where"] == "body layer 3"
    assert report["causes"][0]["operators"][0]["node"] == edit.name
    assert math.isfinite(report["after"]["sqnr"])
    assert main(["isolate", str(path)]) == 1
    assert "The fault shows here." in capsys.readouterr().out
    assert main(["isolate", str(path), "--layer", "3"]) == 2
    assert main(["isolate", str(checkpoint), "--anonymous"]) == 2
    assert main(["isolate", str(checkpoint / "config.json")]) == 2


def test_options_without_an_effect_are_refused(capsule, checkpoint, tmp_path, capsys):
    first = second = str(checkpoint)
    wrong = [
        ["isolate", str(capsule), "--html", str(tmp_path / "x.html")],
        ["isolate", str(capsule), "--dtype", "float16"],
        [
            "isolate",
            first,
            "--against",
            second,
            "--anonymous",
            "--capsule",
            str(tmp_path / "x.zip"),
        ],
        ["isolate", first, "--against", second, "--backend", "openvino"],
        ["isolate", first, "--backend", "onnxruntime", "--backend", "openvino"],
    ]
    for command in wrong:
        assert main(command) == 2, command
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"operators": 5}, {}),
        ({"operators": ["MatMul x"], "where": float("nan")}, {}),
        ({}, {"out_0": np.array(["text"])}),
        ({}, {"out_0": np.array(np.nan, np.float32)}),
    ],
)
def test_a_hostile_capsule_is_refused(facts, expected, capsule, tmp_path):
    with zipfile.ZipFile(capsule) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["capsule.json"] = json.dumps({**json.loads(files["capsule.json"]), **facts}).encode()
    if expected:
        np.savez(tmp_path / "expected.npz", **expected)
        files["expected.npz"] = (tmp_path / "expected.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="no capsule that can be read"):
        read_capsule(tmp_path / "bad.zip")


def test_a_capsule_that_points_to_another_file_is_refused(capsule, tmp_path):
    """In a weight, or in a constant of a subgraph."""
    outside = onnx.TensorProto(data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["secret"], value=outside)
    inner = onnx.helper.make_graph([constant], "inner", [], [onnx.ValueInfoProto(name="secret")])
    branch = onnx.helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=inner)
    with zipfile.ZipFile(capsule) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for place in ("initializer", "node"):
        model = onnx.load_from_string(files["model.onnx"])
        getattr(model.graph, place).append(outside if place == "initializer" else branch)
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
            for name, data in files.items():
                bad.writestr(name, model.SerializeToString() if name == "model.onnx" else data)
        with pytest.raises(ArtifactError, match="points to another file"):
            read_capsule(tmp_path / "bad.zip")


def test_a_bomb_in_a_capsule_is_refused(capsule, tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", in_0=np.zeros(1 << 22, np.float32))
    with zipfile.ZipFile(capsule) as archive, zipfile.ZipFile(tmp_path / "b.zip", "w") as bad:
        for name in archive.namelist():
            data = archive.read(name)
            if name == "inputs.npz":
                data = (tmp_path / "bomb.npz").read_bytes()
            bad.writestr(name, data)
    with pytest.raises(ArtifactError, match="compressed"):
        read_capsule(tmp_path / "b.zip")
