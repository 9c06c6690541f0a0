"""``verify --by-layer``: each layer's own error, and what it inherits."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.cli import main
from qeff_proxy.cli.layer_table import layer_lines
from qeff_proxy.errors import BackendError, UnsupportedModelError, UsageError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.graph.split_layers import split_layers
from qeff_proxy.load.load_model import load_model, wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import random_weights
from qeff_proxy.verify.by_layer import verify_layers
from qeff_proxy.verify.by_layer.calls import calls_of, job_of
from qeff_proxy.verify.by_layer.candidate import remove_leftovers
from qeff_proxy.verify.by_layer.reference import reference_parts
from qeff_proxy.verify.by_layer.results import (
    KindError,
    LayerError,
    LayerResult,
    compare_alike,
)
from qeff_proxy.verify.by_layer.verify_layers import (
    check_alone,
    verify_layers_of,
)
from qeff_proxy.verify.options import VerifyOptions
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.one_home

IDS = [[5, 6, 7, 8, 9, 10, 11], [0, 0, 17, 18, 19, 20, 21]]
REQUEST = Request(inputs={"input_ids": np.array(IDS), "attention_mask": (np.array(IDS) > 0) * 1})
OPTIONS = VerifyOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def llama(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    make_model("llama", layers=6).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_healthy_model_passes(name, make_model, tmp_path):
    make_model(name, layers=6).save_pretrained(tmp_path / name)
    result = verify_layers(str(tmp_path / name), request=REQUEST, options=OPTIONS)
    (backend,) = result.results
    assert result.passed, backend
    assert result.steps == ("prefill-0000", "decode-0000", "decode-0001", "decode-0002")
    layers = [layer.layer for layer in backend.layers]
    assert layers == [None, *range(6), None, None]
    assert all(layer.local.over_peak < 1e-6 for layer in backend.layers)


def test_an_encoder_passes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=131, num_hidden_layers=5, max_position_embeddings=64)
    random_weights(BertModel(config).eval(), 0).save_pretrained(tmp_path / "bert")
    result = verify_layers(str(tmp_path / "bert"), options=OPTIONS)
    (backend,) = result.results
    assert result.passed, backend
    assert [layer.layer for layer in backend.layers] == [None, *range(5)]


def broken(llama: Path, folder: Path, fault: int) -> Any:
    """An export in which a product of one layer has the weight of the layer before."""
    loaded = load_model(str(llama))
    hooks = Plugins.discover().hooks_for("llama")
    export = export_model(loaded, hooks, output=folder, taps="layers")
    path = export.folder / "body.onnx"
    model = ir.load(path)
    weights = model.graph.initializers
    (name,) = (name for name in weights if name.endswith(f".{fault}.mlp.up_proj.weight"))
    weights[name].const_value = weights[name.replace(f".{fault}.", f".{fault - 1}.")].const_value
    ir.save(model, path)
    return export, loaded, hooks


def test_a_fault_in_one_layer_is_local_there_and_inherited_by_all_that_follow(llama, tmp_path):
    export, loaded, hooks = broken(llama, tmp_path / "export", 3)
    names = ["onnxruntime"]
    result = verify_layers_of(export, loaded, names, (REQUEST, REQUEST_TENSORS), OPTIONS, hooks)
    (backend,) = result.results
    assert not result.passed
    assert [layer.name for layer in backend.faulty] == ["body layer 3"]
    inherited = [layer.name for layer in backend.layers if not layer.inherited.passed]
    after = ["body layer 3", "body layer 4", "body layer 5", "body", "lm_head"]
    assert inherited == after


REQUEST_TENSORS = {name: torch.as_tensor(value) for name, value in REQUEST.inputs.items()}


def test_local_errors_equal_those_of_the_whole_model(llama, tmp_path):
    """The reference by layer, with streamed weights, computes what the whole model computes."""
    streamed = verify_layers(str(llama), request=REQUEST, options=OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    whole = verify_layers(wrap_model(model), request=REQUEST, options=OPTIONS)
    for one, other in zip(streamed.results[0].layers, whole.results[0].layers, strict=True):
        assert one.name == other.name
        assert math.isclose(one.local.over_peak, other.local.over_peak, abs_tol=1e-6)


def test_weights_are_in_memory_only_while_they_are_used(llama):
    loaded = load_model(str(llama))
    hooks = Plugins.discover().hooks_for("llama")
    export = export_model(loaded, hooks, taps="layers")
    proxy, weights = reference_parts(loaded, hooks, export)
    assert weights is not None
    module = proxy.part("body").module

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in module.parameters())

    empty = held()
    assert empty < 1000
    with weights.reading(module.parameters()):
        assert held() > 100 * empty
    assert held() == empty


def test_a_backend_that_dies_in_a_layer_keeps_what_is_known(llama, monkeypatch, tmp_path):
    open_once = OnnxRuntimeBackend.open_once

    def dies(self, export, part, options, folder):
        if part.inputs[0].name == "hidden_states.1":
            raise BackendError("no room for layer 2")
        return open_once(self, export, part, options, folder)

    monkeypatch.setattr(OnnxRuntimeBackend, "open_once", dies)
    options = replace(OPTIONS, html=tmp_path / "page.html")
    result = verify_layers(str(llama), request=REQUEST, options=options)
    (backend,) = result.results
    assert "onnxruntime: ERROR in body layer 2: no room for layer 2" in backend.report.read_text()
    assert not backend.passed
    assert backend.error == "body layer 2: no room for layer 2"
    names = ["embedding", *(f"body layer {number}" for number in range(6)), "body", "lm_head"]
    assert [layer.name for layer in backend.layers] == names
    assert [layer.name for layer in backend.layers if not layer.passed] == ["body layer 2"]
    (table, summary, *_) = layer_lines(replace(result, results=(backend,)))
    worst = list(table.columns[-1].cells)
    assert worst[3] == "no room for layer 2"
    assert summary.plain == "onnxruntime: ERROR in body layer 2: no room for layer 2"


def test_a_backend_that_fails_in_every_layer_is_not_tried_in_all(llama, monkeypatch):
    def dies(self, *_arguments):
        raise BackendError("no device")

    monkeypatch.setattr(OnnxRuntimeBackend, "open_once", dies)
    (backend,) = verify_layers(str(llama), request=REQUEST, options=OPTIONS).results
    assert [layer.error for layer in backend.layers] == ["no device"] * 3
    assert backend.error == "embedding: no device"


def test_nothing_is_left_in_the_export(llama, tmp_path):
    options = replace(OPTIONS, output=tmp_path / "export")
    verify_layers(str(llama), request=REQUEST, options=options)
    assert not [path for path in (tmp_path / "export").iterdir() if path.name.startswith(".")]


def test_the_command_prints_a_row_per_layer(llama, capsys):
    arguments = ["verify", str(llama), "--by-layer", "--ids", "5,6,7,8", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for layer in range(6):
        assert f"body layer {layer} " in printed
    assert "PASSED" in printed
    assert main([*arguments, "--json", "--tol", "body.out.hidden_states.layer-04=peak:0"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["backends"][0]["faulty"] == ["body layer 4"]
    assert main([*arguments, "--tol", "body.out.hidden_states.4=peak:0"]) == UsageError.exit_code
    assert "body.out.hidden_states.4=peak:0 holds no tensor" in capsys.readouterr().err


def test_options_without_a_use_are_refused(llama, capsys):
    assert main(["verify", str(llama), "--by-layer", "--speed"]) == UsageError.exit_code
    assert "--speed and --by-layer exclude each other" in capsys.readouterr().err


def test_an_export_is_refused(demo_export):
    with pytest.raises(UsageError, match="an export cannot be verified layer by layer"):
        verify_layers(demo_export)


def test_a_layer_that_reads_an_earlier_one_is_refused(llama):
    loaded = load_model(str(llama))
    export = export_model(loaded, Plugins.discover().hooks_for("llama"), taps="layers")
    part = export.part("body")
    graph = split_layers(ir.load(export.folder / part.file), part.inputs, part.outputs)[3]
    check_alone(part, graph, 3)
    with pytest.raises(UnsupportedModelError, match=r"body layer 3 also reads hidden_states\.2"):
        check_alone(part, graph, 4)


def print_peaks(folders):
    """The most memory in MB that this process has had after each of some verifications."""
    request = Request(inputs={"input_ids": np.arange(5, 37)[None]})
    for folder in folders:
        options = VerifyOptions(max_new_tokens=2)
        assert verify_layers(str(folder), request=request, options=options).passed
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)


def test_memory_does_not_grow_with_depth(tmp_path, forked):
    """22 more layers of 12.6 MB, 277 MB in all, need less than half of that more."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
    for depth in (2, 24):
        config = LlamaConfig(**sizes, vocab_size=131, num_hidden_layers=depth)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / str(depth))
    done = forked(print_peaks, [tmp_path / "2", tmp_path / "24"])
    assert done.returncode == 0, done.stderr
    shallow, deep = map(int, done.stdout.split())
    assert deep - shallow < 22 * 12.6 / 2


def test_what_ran_before_ctrl_c_is_shown(llama, tmp_path, monkeypatch, capsys):
    opened = iter(range(100))
    original = OnnxRuntimeBackend.open_once

    def interrupted_open(self, *arguments):
        if next(opened) == 3:  # the embedding, layers 0 and 1
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "open_once", interrupted_open)
    output = ["--output", str(tmp_path / "export"), "--max-new-tokens", "2"]
    ids = ["--ids", "5,6,7"]
    output += ["--html", str(tmp_path / "page.html")]
    assert main(["verify", str(llama), "--by-layer", *ids, *output]) == 130
    page = (tmp_path / "page.html").read_text()
    assert "interrupted at body layer 2: what follows did not run" in page
    assert "<dt>input</dt><dd>input_ids [1, 3]</dd>" in page
    out = " ".join(capsys.readouterr().out.split())
    assert "body layer 1 passed" in out
    assert "so far, all of 3 pieces are within tolerance" in out
    assert "interrupted at body layer 2: what follows did not run" in out
    assert not list((tmp_path / "export").glob(".*"))


@pytest.mark.parametrize("culprit", ["the program", "the backend"])
def test_a_full_disk_ends_the_run_and_what_ran_before_is_shown(
    culprit, llama, tmp_path, monkeypatch, capsys
):
    calls = iter(range(100))
    place = (
        (tempfile, "NamedTemporaryFile")
        if culprit == "the program"
        else (OnnxRuntimeBackend, "open_once")
    )
    original = getattr(*place)

    def full(*arguments, **options):
        if next(calls) == 3:  # the embedding, layers 0 and 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    folder = tmp_path / "export"
    export_model(
        load_model(str(llama)), Plugins.discover().hooks_for("llama"), output=folder, taps="layers"
    )
    monkeypatch.setattr(*place, full)
    command = ["verify", str(llama), "--by-layer", "--output", str(folder), "--ids", "5,6,7"]
    assert main([*command, "--max-new-tokens", "2"]) == 7
    out, err = capsys.readouterr()
    assert f"cannot write {folder}: No space left on device" in err
    assert err.count("\n") == 1
    out = " ".join(out.split())
    assert "body layer 1 passed" in out
    assert "so far, all of 3 pieces are within tolerance" in out
    assert "stopped at body layer 2: what follows did not run" in out
    assert not list(folder.glob(".*"))


def test_what_a_killed_run_left_is_removed_and_another_runs_files_stay(tmp_path):
    for name in ("killed", "runs"):
        (tmp_path / f".layer-{name}.onnx").write_bytes(b"x")
        (tmp_path / f".layer-{name}.files").mkdir()
    (tmp_path / ".layer-interrupted.files").mkdir()  # by Ctrl-C while it was removed
    (tmp_path / "body.onnx").touch()
    source = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
        "print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", source, str(tmp_path / ".layer-runs.onnx")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"1\n"
        remove_leftovers(tmp_path)
        other.stdin.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == [
        ".layer-runs.files",
        ".layer-runs.onnx",
        "body.onnx",
    ]


@pytest.fixture(scope="module")
def rounded(llama, tmp_path_factory) -> Any:
    """A backend that is said to compute in float16: healthy, then one weight of layer 3 by 2%."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "precision", lambda _self, _options: "float16")
        loaded = load_model(str(llama))
        hooks = Plugins.discover().hooks_for("llama")
        folder = tmp_path_factory.mktemp("rounded") / "export"
        export = export_model(loaded, hooks, output=folder, taps="layers")
        given = ["onnxruntime"], (REQUEST, REQUEST_TENSORS), OPTIONS, hooks
        healthy = verify_layers_of(export, loaded, *given)
        model = ir.load(folder / "body.onnx")
        weights = model.graph.initializers
        (name,) = (name for name in weights if name.endswith(".3.mlp.down_proj.weight"))
        values = weights[name].const_value.numpy()
        weights[name].const_value = ir.tensor(values * np.float32(1.02), name=name)
        ir.save(model, folder / "body.onnx")
        return healthy, verify_layers_of(export, loaded, *given)


def test_each_layer_has_its_noise_floors(rounded):
    healthy, _ = rounded
    assert healthy.passed
    (backend,) = healthy.results
    for layer in backend.layers[1:-1]:
        floor = layer.local.nearest.floor
        assert 50 < floor < 85
        assert layer.inherited.nearest.floor < floor + 1
    first, *_, last, _after, _head = (layer.inherited.nearest.floor for layer in backend.layers)
    assert last < first
    report = healthy.to_json()["backends"][0]["layers"][3]["local"]
    kinds = {kind["kind"] for kind in report["kinds"]}
    assert {"hidden_states in prefill", "present.key in decode"} < kinds


def test_a_small_fault_shows_beside_the_layers_like_it(rounded):
    """Its error is within the fixed limit of half precision."""
    _, faulty = rounded
    (backend,) = faulty.results
    assert [layer.name for layer in backend.faulty] == ["body layer 3"]
    local = backend.faulty[0].local
    assert 40 < local.sqnr < local.nearest.limit
    assert local.nearest.kind.startswith("hidden_states in ")
    assert all(layer.inherited.passed for layer in backend.layers)
    table, summary, *_ = layer_lines(faulty)
    headings = [column.header for column in table.columns]
    assert headings[2:6] == ["local dB", "floor", "limit", "of peak"]
    assert "FAILED: out of line by its own error: body layer 3" in summary.plain


def layers_with(gaps: Mapping[int, float]) -> list[LayerResult]:
    """Layers whose errors are so many dB above a floor of 70."""
    return [
        LayerResult(
            "body",
            number,
            LayerError(kinds=(KindError("hidden_states in prefill", 70 - gap, 70.0, 40.0),)),
            LayerError(),
        )
        for number, gap in gaps.items()
    ]


@pytest.mark.parametrize(
    ("gaps", "faulty"),
    [
        ((16.2, 16.1, 15.9, 23.0, 16.5, 16.0), [3]),  # a MiniLM and a weight scaled by 1.05, on HTP
        ((16.2, 16.1, 15.9, 15.7, 16.5, 16.0), []),
        ((10.6, 5.8, 3.8, 1.3, 3.3, 8.4, 4.1, 3.0, 5.3, -4.4, 7.7, 19.9), []),  # a healthy Llama
        ((13.0, 1.5, 0.2, 0.1, 0.3, 0.2, 12.0), []),  # huge activations between two layers
        ((1.0, 2.0, 25.0), []),  # too few to tell what is usual
    ],
)
def test_layers_are_compared_with_those_like_them(gaps, faulty):
    judged = compare_alike(layers_with(dict(enumerate(gaps))))
    assert [layer.layer for layer in judged if not layer.local.passed] == faulty


def test_a_precision_that_is_not_simulated_is_said(llama, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeBackend, "precision", lambda _self, _options: "a16w8")
    result = verify_layers(str(llama), request=REQUEST, options=OPTIONS)
    assert result.results[0].note == "there is none of a16w8"
    said = [str(line) for line in layer_lines(result)]
    assert (
        "Note: the limits are fixed, not relative to a noise floor: there is none of a16w8" in said
    )


@pytest.mark.filterwarnings("default:verifying")
def test_a_model_that_does_not_fit_in_memory_is_verified_by_layer(llama, monkeypatch, capsys):
    monkeypatch.setattr("qeff_proxy.verify.by_layer.memory.free_memory", lambda: 1_000_000)
    command = ["verify", str(llama), "--ids", "5,6,7,8", "--max-new-tokens", "2"]
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["backends"][0]["layers"]) == 9
    assert "0.0 GB are free; it is verified layer by layer (--by-layer)" in said.err
    assert main([*command, "--io-steps", "first", "--json"]) == 0
    said = capsys.readouterr()
    assert "layers" not in json.loads(said.out)["backends"][0]
    assert "but --io-steps and --by-layer exclude each other" in said.err


def test_the_steps_take_a_continuation_that_is_given(llama):
    options = replace(OPTIONS, continuation=(17, 4, 99))
    result = verify_layers(str(llama), request=REQUEST, options=options)
    assert result.passed
    assert result.steps == ("prefill-0000", "decode-0000", "decode-0001")
    loaded = load_model(str(llama))
    hooks = Plugins.discover().hooks_for("llama")
    export = export_model(loaded, hooks, taps="layers")
    job = job_of(export, options, REQUEST_TENSORS)
    calls = calls_of(job, "embedding", {})
    assert [call.inputs["input_ids"].tolist() for call in calls[1:]] == [[[17]] * 2, [[4]] * 2]
    with pytest.raises(UsageError, match="500 is no token of this model"):
        verify_layers(str(llama), request=REQUEST, options=replace(OPTIONS, continuation=(500,)))
