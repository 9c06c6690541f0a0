"""Pack, run a command, unpack, compare: with a small model in ONNX Runtime as the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device_stand_in import Sessions, run_device
from device_targets import make_target
from qeff_proxy.cli import main
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.device import PackOptions, pack_dump, unpack_outputs
from qeff_proxy.dump import read_dump

STAND_IN = Path(__file__).with_name("device_stand_in.py")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, demo_checkpoint):
    """An export of tiny-gpt2 and the dump of a run in ONNX Runtime, prompt in chunks of two."""
    home = tmp_path_factory.mktemp("reference")
    command = ["generate", str(demo_checkpoint), "One day the cat sat", "--json"]
    command += ["--output", str(home / "export"), "--io-dir", str(home / "dump")]
    command += ["--prefill-seq-len", "2", "--max-new-tokens", "3"]
    before = os.environ.get("QEFF_HOME")
    os.environ["QEFF_HOME"] = str(home / "home")
    try:
        assert main(command) == 0
    finally:
        os.environ.pop("QEFF_HOME") if before is None else os.environ.update(QEFF_HOME=before)
    return read_dump(home / "dump"), home / "export"


def device_command(export, *fault):
    """The stand-in as a command of its own."""
    words = [sys.executable, STAND_IN, "{folder}", export, *fault]
    return " ".join(str(word) for word in words)


def run_on(reference, *arguments, fault=()):
    dump, export = reference
    command = ["run-on", device_command(export, *fault), str(dump.folder), *arguments]
    return main(command)


def test_a_sound_device_passes(reference, tmp_path, capsys):
    code = run_on(reference, "--for", "npy", "--output", str(tmp_path / "lab"))
    said = capsys.readouterr().out
    assert code == 0, said
    assert "PASSED: all of 7 tensors in 5 steps" in said
    assert "fed the reference's cache" in said
    assert (tmp_path / "lab" / "packed" / "pack.json").exists()
    assert len(read_dump(tmp_path / "lab" / "dump").steps) == 5


@pytest.mark.parametrize("fault", ["missing_step", "not_a_number"])
def test_a_fault_fails_the_comparison(fault, reference, capsys):
    assert run_on(reference, "--for", "npy", "--json", fault=[fault]) == 1
    value = json.loads(capsys.readouterr().out)
    failed = [tensor["why"] for tensor in value["tensors"] if not tensor["passed"]]
    if fault == "missing_step":
        assert value["problems"][0].startswith("only the reference has 1 step")
    else:
        assert "NaN or infinite element" in failed[0]


def test_half_a_file_is_one_line(reference, capsys):
    assert run_on(reference, "--for", "npy", fault=["half_a_file"]) == 9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ".npy" in said


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("echo starting; echo no such device >&2; exit 3", "exit status 3: no such device"),
        ("true", "the command left no file below"),
    ],
)
def test_a_command_that_fails_is_quoted(command, problem, reference, capsys):
    assert main(["run-on", command, str(reference[0].folder), "--for", "npy"]) == 8
    *shown, said = capsys.readouterr().err.splitlines()
    assert problem in said
    assert shown == (["starting", "no such device"] if "echo" in command else [])


def test_a_name_that_is_of_no_file_is_refused_and_nothing_is_kept(reference, tmp_path, capsys):
    output = ["--output", str(tmp_path / "lab")]
    assert run_on(reference, "--for", "npy", "--name", "no_such_file=x", *output) == 2
    assert "--name no_such_file=x matches no file. There are" in capsys.readouterr().err
    assert not (tmp_path / "lab" / "dump").exists()


@pytest.mark.parametrize("name", ["qnn-net-run", "snpe-net-run"])
def test_groups_of_other_shapes_may_have_binaries_of_their_own(name, reference, tmp_path):
    tool = tmp_path / "bin" / name
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nfor word; do case "$word" in /b/*) echo "$word";; esac; done\n')
    tool.chmod(0o755)
    dump, _ = reference
    pack_dump(dump, tmp_path / "p", make_target(name), PackOptions())
    variable = make_target(name).variable

    def run(**binaries):
        path = f"{tool.parent}:{os.environ['PATH']}"
        settings = {"PATH": path, "BACKEND": "b", **binaries}
        command = ["sh", str(tmp_path / "p" / "run.sh")]
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    done = run(**{variable: "/b/all", f"{variable}_BODY_1": "/b/second"})
    assert done.stdout.split()[:3] == ["/b/all", "/b/second", "/b/all"]
    none = run()
    assert none.returncode
    assert f"set it, or {variable}_BODY_0, to the compiled binary" in none.stderr


def test_polygraphys_own_command_runs_what_is_packed_for_it(reference, capsys):
    dump, export = reference
    polygraphy = f"{Path(sys.executable).parent}/polygraphy run {export}/body.onnx --onnxrt"
    files = "--load-inputs body/inputs.json --save-outputs {outputs}/body/outputs.json"
    options = ["--for", "polygraphy", "--dtype", "position_ids=int64"]
    assert main(["run-on", f"{polygraphy} {files}", str(dump.folder), *options]) == 0
    assert "PASSED: all of 7 tensors in 5 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, "reference") for name in ("npy", "qaic-runner", "qnn-net-run", "onnx")),
        *((name, "device") for name in ("npy", "qaic-runner")),  # the others carry no cache
    ],
)
def test_the_model_runs_on_packed_files(name, cache, reference, tmp_path):
    dump, export = reference
    target = make_target(name)
    index = pack_dump(dump, tmp_path / "p", target, PackOptions(cache=cache))
    run_device(tmp_path / "p", Sessions(export))
    unpack_outputs(tmp_path / "p", target, index, dump, tmp_path / "d")
    comparison = compare_dumps(dump, tmp_path / "d", tensors=["body.out.*"])
    assert comparison.passed
    assert max(float(tensor.step_error.max()) for tensor in comparison.tensors) < 1e-6


def test_a_binary_of_fixed_shapes_gives_the_dynamic_results(reference, tmp_path):
    dump, export = reference
    target = make_target("qnn-net-run")
    shapes = CompileOptions(batch_size=2, prefill_seq_len=4, ctx_len=24)
    options = PackOptions(export=export, shapes=shapes)
    index = pack_dump(dump, tmp_path / "p", target, options)
    groups = [f"body.batch-2.query-{query}.past-{24 - query}" for query in (4, 1)]
    assert list(index.groups()) == groups
    run_device(tmp_path / "p", Sessions(export))
    unpack_outputs(tmp_path / "p", target, index, dump, tmp_path / "d")
    comparison = compare_dumps(dump, tmp_path / "d", tensors=["body.out.*"])
    assert comparison.passed
    assert max(float(tensor.step_error.max()) for tensor in comparison.tensors) < 1e-5


def test_errors_of_a_carried_cache_add_up_and_isolated_steps_do_not(reference, tmp_path):
    dump, export = reference
    target = make_target("npy")
    failed = {}
    for cache in ("reference", "device"):
        folder = tmp_path / cache
        index = pack_dump(dump, folder / "p", target, PackOptions(cache=cache))
        sessions = Sessions(export)

        def faulty(run, inputs, sessions=sessions):
            """The keys of the first chunk are wrong."""
            outputs = sessions(run, inputs)
            if (run["phase"], run["index"]) == ("prefill", 0):
                for name in ("present.1.key", "past_key_values.1.key"):
                    known = outputs if name in outputs else sessions.cache
                    known[name] = known[name] * 1.5
            return outputs

        run_device(folder / "p", faulty)
        unpack_outputs(folder / "p", target, index, dump, folder / "d")
        comparison = compare_dumps(dump, folder / "d", tensors=["body.out.last*"])
        failed[cache] = {
            comparison.steps[at].label
            for tensor in comparison.tensors
            for at, passed in zip(tensor.steps, tensor.step_passed, strict=True)
            if not passed
        }
    assert failed["reference"] == set()
    assert {"prefill-0001", "decode-0000", "decode-0001"} <= failed["device"]


def test_the_pack_and_unpack_commands_make_the_loop(reference, tmp_path, capsys, monkeypatch):
    dump, export = reference
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dump.folder, "run")
    assert main(["pack", "run", "--for", "npz"]) == 0
    run_device(Path("run-npz"), Sessions(export))
    shutil.move("run-npz/outputs", "back")
    assert main(["unpack", "run-npz", "--like", "run", "--outputs", "back"]) == 0
    assert "Wrote run-npz-dump: 7 tensors in 5 steps" in capsys.readouterr().out
    assert main(["compare", "run", "run-npz-dump", "--tensors", "body.out.*"]) == 0
    assert main(["unpack", "run-npz"]) == 2
    assert "Name it: --like DUMP" in capsys.readouterr().err
    assert main(["unpack", "run", "--like", "run"]) == 9
    assert "add --from FORMAT" in capsys.readouterr().err
    assert np.load("run-npz/body/decode-0000.npz")["inputs_embeds"].shape == (1, 1, 96)
