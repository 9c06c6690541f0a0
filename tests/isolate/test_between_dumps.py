"""Two dumps, one of a device with a fault: the operators between two of its values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from operator_faults import Edit, Fault, attribute, coarse, then
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.cli import main
from qeff_proxy.dump import read_dump
from qeff_proxy.export.export_model import export_model
from qeff_proxy.isolate import describe_fault, isolate_dumps, run_capsule
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins

pytestmark = pytest.mark.one_home

FULL = "layers,norms,q,k,v,o,gate,up,down"
IDS = "3,10,17,24,31,38"
QUERY = Fault("MatMul", "layers.3.self_attn.q_proj", coarse(2))


class Bench:
    """An export, the reference's dump of it, and its packed inputs."""

    def __init__(self, checkpoint: Path, folder: Path, taps: str) -> None:
        loaded = load_model(str(checkpoint))
        hooks = Plugins.discover().hooks_for(loaded.model_type)
        self.folder = folder
        self.export = export_model(loaded, hooks, output=folder / "export", taps=taps).folder
        self.reference = folder / "reference"
        words = ["generate", str(self.export), "--ids", IDS, "--max-new-tokens", "3"]
        assert main([*words, "--io-dir", str(self.reference)]) == 0

    def device(self, edit: Edit, *, half: bool = False) -> Path:
        """The dump of a device whose graph was edited; every step has the reference's cache."""
        packed, output = self.folder / "packed", self.folder / "device"
        for old in (packed, output):
            shutil.rmtree(old, ignore_errors=True)
        assert main(["pack", str(self.reference), "--for", "npy", "--output", str(packed)]) == 0
        model = ir.load(self.export / "body.onnx")
        edit(model)
        ir.save(model, self.export / "edited.onnx")
        session = onnxruntime.InferenceSession(self.export / "edited.onnx")
        (self.export / "edited.onnx").unlink()
        for step in (packed / "body/steps.txt").read_text().split():
            place = packed / "body" / step
            feeds = {i.name: np.load(place / f"{i.name}.npy") for i in session.get_inputs()}
            (packed / "outputs/body" / step).mkdir(exist_ok=True)
            outputs = session.run(None, feeds)
            for spec, array in zip(session.get_outputs(), outputs, strict=True):
                kept = array.astype(np.float16) if half else array
                np.save(packed / "outputs/body" / step / f"{spec.name}.npy", kept)
        words = ["unpack", str(packed), "--like", str(self.reference), "--output", str(output)]
        assert main([*words, *(["--dtype", "*=float16"] if half else [])]) == 0
        return output

    def logits_sqnr(self, device: Path) -> float:
        """Of the first step's logits, as ONNX Runtime and NumPy compute it from the last states."""
        head = onnxruntime.InferenceSession(self.export / "lm_head.onnx")
        states = read_dump(device).array("prefill", 0, "body.out.last_hidden_state")
        wanted = read_dump(self.reference).array("prefill", 0, "lm_head.out.logits")
        last = states[:, -wanted.shape[1] :]
        error = head.run(None, {"last_hidden_state": last})[0].astype(np.float64) - wanted
        return float(10 * np.log10(np.sum(np.square(wanted, dtype=np.float64)) / np.sum(error**2)))

    def isolate(self, device: Path, **more: Any) -> Any:
        dumps = read_dump(self.reference), read_dump(device)
        return isolate_dumps(*dumps, read_export(self.export), **more)


@pytest.fixture(scope="module")
def bench(checkpoint, tmp_path_factory) -> Bench:
    return Bench(checkpoint, tmp_path_factory.mktemp("full"), FULL)


@pytest.fixture
def nothing() -> Callable[[Any], None]:
    return lambda _model: None


def test_a_healthy_device_is_not_accused(bench, nothing, tmp_path):
    fault = bench.isolate(bench.device(nothing))
    assert fault.healthy, describe_fault(fault)
    exact = fault.local.sqnr
    fault = bench.isolate(bench.device(nothing, half=True), capsule=tmp_path / "none.zip")
    said = describe_fault(fault)
    assert fault.healthy, said
    assert 50 < fault.local.sqnr < 90 < exact
    assert f"{fault.local.tensor}, {fault.local.sqnr:.1f} dB" in said[1]
    assert said[2] == "No capsule was written: there is no fault to show."


def test_nan_is_called_so(bench):
    three = np.zeros(96, np.float32)
    three[[5, 50, 51]] = np.nan
    edit = Fault("MatMul", "layers.3.mlp.up_proj", then(("Add", [three])))
    fault = bench.isolate(bench.device(edit))
    said = "\n".join(describe_fault(fault))
    assert f"mlp_up_proj.layer-03 has {3 * len(IDS.split(','))} NaN of " in said
    assert "100%" not in said
    assert [o.node for c in fault.causes for o in c.operators] == [edit.name]


FAULTS = {
    "a product": (QUERY, 1),
    "rounding of the activation": (Fault("Sigmoid", "layers.3.mlp", coarse(2)), 4),
    "an axis": (Fault("Softmax", "layers.3.self_attn", attribute("axis", 2)), 32),
    "a norm": (Fault("Mul", "layers.3.input_layernorm", coarse(1), nth=1), 7),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_operators_between_two_taps_are_named(kind, bench, tmp_path):
    edit, most = FAULTS[kind]
    device = bench.device(edit)
    fault = bench.isolate(device, capsule=tmp_path / "fault.zip")
    said = "\n".join(describe_fault(fault))
    assert fault.where == "body layer 3", said
    (cause,) = fault.causes
    named = [operator.node for operator in cause.operators]
    assert edit.name in named
    assert len(named) <= most, said
    assert cause.remaining < 1e-5 < cause.error
    assert "Proof: with it exact, the error of lm_head.out.logits goes from" in said
    assert fault.before.sqnr == pytest.approx(bench.logits_sqnr(device), abs=0.1)
    assert fault.after.sqnr > 100
    if most == 1:
        assert cause.operators[0].weights == ("model.layers.3.self_attn.q_proj.weight",)
    assert not run_capsule(tmp_path / "fault.zip", "onnxruntime").shows


def test_with_taps_of_layers_alone_the_layer_is_named(checkpoint, tmp_path):
    bench = Bench(checkpoint, tmp_path, "layers")
    fault = bench.isolate(bench.device(FAULTS["rounding of the activation"][0]))
    said = "\n".join(describe_fault(fault))
    assert fault.where == "body layer 3"
    assert not fault.causes
    assert "none of these can be named" in said


def test_a_device_that_carries_its_cache_is_judged_step_by_step(bench, tmp_path):
    """Errors that come with the cache are not those of a later step."""
    device = bench.device(QUERY)
    manifest = json.loads((device / "manifest.json").read_text())
    assert manifest["provenance"]["device"]["cache"] == "reference"
    manifest["provenance"]["device"]["cache"] = "device"
    (device / "manifest.json").write_text(json.dumps(manifest))
    fault = bench.isolate(device)
    assert [o.node for c in fault.causes for o in c.operators] == [QUERY.name]


def test_another_export_is_refused(bench, nothing, checkpoint, make_model, tmp_path, capsys):
    device = bench.device(nothing)
    other = tmp_path / "other"
    hooks = Plugins.discover().hooks_for("llama")
    make_model("llama", seed=5, layers=6).save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"))
    export_model(loaded, hooks, output=other, taps=FULL)
    command = ["isolate", str(bench.reference), "--against", str(device), "--export"]
    capsys.readouterr()
    assert main([*command, str(other)]) == 1
    assert "name the export that it ran" in capsys.readouterr().out
    export_model(load_model(str(checkpoint)), hooks, output=tmp_path / "plain")
    assert main([*command, str(tmp_path / "plain")]) == 9
    assert "export it again with the same --taps" in capsys.readouterr().err


def test_the_command(bench, tmp_path, capsys):
    device = bench.device(QUERY)
    capsys.readouterr()
    command = ["isolate", str(bench.reference), "--against", str(device)]
    page = tmp_path / "fault.html"
    assert main([*command, "--export", str(bench.export), "--json", "--html", str(page)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["causes"][0]["operators"][0]["node"] == QUERY.name
    assert f"<title>{QUERY.name}</title>" in page.read_text()
    for wrong, said in (
        (["isolate", str(bench.reference), "--export", str(bench.export)], "--against DEVICE"),
        ([*command, "--export", str(bench.export), "--layer", "3"], "no --layer"),
        (command, "with --export EXPORT"),
        (["isolate", str(bench.export), "--against", str(device)], "with --export EXPORT"),
        (["isolate", str(bench.export)], "Name the checkpoint"),
    ):
        assert main(wrong) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
