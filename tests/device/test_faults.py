"""What comes back wrong gives a failed comparison, or one line that names file and reason."""

from __future__ import annotations

import os
import re
import shutil

import numpy as np
import pytest
from device_faults import FAULTS
from device_models import export_of, write_dump
from device_stand_in import run_device
from device_targets import make_target
from qeff_proxy.compare import compare_dumps
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.device import Conventions, PackOptions, pack_dump, unpack_outputs
from qeff_proxy.dump import read_dump
from qeff_proxy.errors import DumpError, UsageError

TARGETS = ("npy", "qnn-net-run", "qaic-runner", "trtexec")
GLOBS = ["body.out.*"]
FIXED = CompileOptions(prefill_seq_len=4, ctx_len=12)


@pytest.fixture(scope="module", params=TARGETS)
def ran(request, tmp_path_factory, echo):
    """A packed folder of fixed shapes with sound outputs, its index, target and dump."""
    folder = tmp_path_factory.mktemp("ran")
    dump = read_dump(write_dump("gpt2", folder / "reference"))
    target = make_target(request.param)
    options = PackOptions(export=export_of("gpt2", folder), shapes=FIXED)
    index = pack_dump(dump, folder / "packed", target, options)
    run_device(folder / "packed", echo(dump))
    return folder / "packed", target, index, dump


def copy_of(ran, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(ran[0], folder)
    return folder


#: Fault → what is said, or None where the comparison fails.
SAID = {
    "missing_tensor": None,
    "missing_step": None,
    "half_a_file": r"cut short|bytes follow|header|is not",
    "cut_short": r"cut short|bytes follow|header|is not",
    "written_twice": r"has \d+ bytes, not the \d+",
    "half_precision": r"say what it is: --dtype '.*=float16' or --dtype '.*=bfloat16'",
    "unknown_name": r"has no file named .*, and .*output_42.* may be it.*--name 'output_42",
    "copied_name": r"may both be .*--name '.*_RetainedState='",
    "empty_file": r"cut short|is not a \.npy array",
    "integers": r"\.npy is int32, and .* is float32. If it is quantized: --quantized '",
    "noise_in_a_file": None,  # or what is said of a broken header
}


#: Target → the faults that its layout has no place for.
NO_PLACE = {
    "npy": {"big_endian", "copied_name", "half_precision", "written_twice"},
    "qaic-runner": {"broken_header", "copied_name"},
    "qnn-net-run": {"broken_header"},
    "trtexec": {"broken_header", "copied_name"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, ran, tmp_path):
    _, target, index, dump = ran
    folder, rng = copy_of(ran, tmp_path), np.random.default_rng(len(fault))
    changed = FAULTS[fault](folder, rng)
    assert (changed is None) == (fault in NO_PLACE[target.name])
    if changed is None:
        return
    try:
        unpack_outputs(folder, target, index, dump, tmp_path / "d")
    except (DumpError, UsageError) as error:
        said = str(error)
        assert re.search(SAID.get(fault) or r"is not a \.npy array|declares|shape", said), said
        assert "\n" not in said
        assert str(folder / "outputs") in said or "packed" in said
        assert not (tmp_path / "d").exists()
        return
    assert SAID.get(fault) is None or fault == "integers", fault
    assert not compare_dumps(dump, tmp_path / "d", tensors=GLOBS).passed


def test_without_a_fault_all_is_well(ran, tmp_path):
    _, target, index, dump = ran
    result = unpack_outputs(copy_of(ran, tmp_path), target, index, dump, tmp_path / "d")
    assert (result.missing, result.ignored) == ([], [])
    assert compare_dumps(dump, tmp_path / "d", tensors=GLOBS).passed


def test_missing_steps_are_said_and_no_step_takes_their_place(ran, tmp_path):
    _, target, index, dump = ran
    folder = copy_of(ran, tmp_path)
    place = {"qnn-net-run": "body.batch-1.query-1.past-11/Result_1"}.get(
        target.name, "body.batch-1.query-1.past-11/decode-0001"
    )
    shutil.rmtree(folder / "outputs" / place)
    result = unpack_outputs(folder, target, index, dump, tmp_path / "d")
    assert result.missing == ["decode-0001 of body"]
    comparison = compare_dumps(dump, tmp_path / "d", tensors=GLOBS)
    assert not comparison.passed
    assert comparison.problems == ["only the reference has 1 step (decode-0001)"]
    assert all(tensor.passed for tensor in comparison.tensors)


def test_another_dump_is_refused(ran, tmp_path):
    _, target, index, _ = ran
    other = read_dump(write_dump("gpt2", tmp_path / "other", seed=1))
    with pytest.raises(DumpError, match="was packed from another dump"):
        unpack_outputs(ran[0], target, index, other, tmp_path / "d")


def test_a_name_is_told_by_the_user(ran, tmp_path):
    _, target, index, dump = ran
    folder = copy_of(ran, tmp_path)
    said = {"output_9": "x", "body.*/output_9": "last_hidden_state"}
    for path in sorted((folder / "outputs").rglob("last_hidden_state*")):
        path.rename(path.with_name(path.name.replace("last_hidden_state", "output_9")))
    with pytest.raises(DumpError, match=r"has no file named last_hidden_state"):
        unpack_outputs(folder, target, index, dump, tmp_path / "d")
    unpack_outputs(folder, target, index, dump, tmp_path / "d", Conventions(names=said))
    assert compare_dumps(dump, tmp_path / "d", tensors=GLOBS).passed
    names = Conventions(names={"encoder*/output_9": "x"})
    with pytest.raises(UsageError, match=r"--name encoder\*/output_9=x matches no file"):
        unpack_outputs(folder, target, index, dump, tmp_path / "e", names)
    names = Conventions(names={"output_9": "x"})
    with pytest.raises(UsageError, match="body has no output 'x'"):
        unpack_outputs(folder, target, index, dump, tmp_path / "e", names)
    result = unpack_outputs(
        folder, target, index, dump, tmp_path / "f", Conventions(names={"output_9": ""})
    )
    assert len(result.missing) == len(result.ignored) == 5


def test_nothing_that_came_back_is_an_error(ran, tmp_path):
    _, target, index, dump = ran
    folder = copy_of(ran, tmp_path)
    for entry in (folder / "outputs").iterdir():
        shutil.rmtree(entry)
    with pytest.raises(DumpError, match=r"holds no output of any step.*--outputs DIR"):
        unpack_outputs(folder, target, index, dump, tmp_path / "d")
    with pytest.raises(DumpError, match=r"is not a folder.*--outputs DIR"):
        unpack_outputs(folder, target, index, dump, tmp_path / "d", outputs=folder / "nowhere")
    assert not (tmp_path / "d").exists()


def test_a_list_that_was_shuffled_tells_the_steps_by_its_paths(tmp_path, dumps, echo):
    dump, target = dumps["gpt2"], make_target("qnn-net-run")
    options = PackOptions(export=export_of("gpt2", tmp_path), shapes=FIXED)
    index = pack_dump(dump, tmp_path / "packed", target, options)
    group = "body.batch-1.query-1.past-11"
    path = tmp_path / "packed" / group / "input_list.txt"
    lines = path.read_text().splitlines()
    run_device(tmp_path / "packed", echo(dump))
    outputs = tmp_path / "packed" / "outputs" / group
    for number, other in ((0, 12), (1, 10), (2, 11), (12, 2), (10, 0), (11, 1)):
        if (outputs / f"Result_{number}").exists():
            (outputs / f"Result_{number}").rename(outputs / f"Result_{other}")
    # Result_0 is now what the second line gave, Result_1 the third, Result_2 the first.
    path.write_text("\n".join([lines[1], lines[2], lines[0]]) + "\n")
    unpack_outputs(tmp_path / "packed", target, index, dump, tmp_path / "d")
    assert compare_dumps(dump, tmp_path / "d", tensors=GLOBS).passed
    path.write_text("\n".join([lines[1], lines[1], lines[0]]) + "\n")
    with pytest.raises(DumpError, match="lists decode-0001 twice"):
        unpack_outputs(tmp_path / "packed", target, index, dump, tmp_path / "e")
    path.write_text(f"{lines[1]}\n")
    with pytest.raises(DumpError, match=r"Result_1 has no line in .*input_list\.txt"):
        unpack_outputs(tmp_path / "packed", target, index, dump, tmp_path / "e")
    path.write_text("elsewhere/x.raw\n")
    with pytest.raises(DumpError, match=r"line 1 of .*input_list\.txt has files of elsewhere"):
        unpack_outputs(tmp_path / "packed", target, index, dump, tmp_path / "e")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "x"}, "is not the index of a packed folder"),
        ({"version": 2}, "has another version than 1"),
        ({"runs": []}, "lists no runs"),
        ({"cache": "x"}, "'cache'"),
        ({"dump": "0" * 64}, "pack.json was changed since it was written"),
    ],
)
def test_a_damaged_index_is_refused(change, problem, tmp_path, dumps, capsys):
    import json

    from qeff_proxy.cli import main

    dump = dumps["bge"]
    pack_dump(dump, tmp_path / "p", make_target("npy"), PackOptions())
    path = tmp_path / "p" / "pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    command = ["unpack", str(tmp_path / "p"), "--like", str(dump.folder)]
    assert main([*command, "--output", str(tmp_path / "d")]) == 9
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "field",
    [
        {"dtype": "float17"},
        {"shape": [2**40, 2**40]},
        {"valid": [[0, 9]]},
        {"valid": [[0, 1], [0, 999], [0, 8]]},
        {"axes": [0, 0, 1]},
        {"shape": [-1]},
    ],
)
def test_a_hostile_index_is_refused(field, tmp_path, dumps):
    import json

    from qeff_proxy.device.index import read_index

    pack_dump(dumps["bge"], tmp_path / "p", make_target("npy"), PackOptions())
    path = tmp_path / "p" / "pack.json"
    value = json.loads(path.read_text())
    value["runs"][0]["outputs"][1] |= field
    path.write_text(json.dumps(value))
    with pytest.raises(DumpError):
        read_index(tmp_path / "p")


def test_the_reference_is_not_replaced(ran):
    folder, target, index, dump = ran
    for place in (dump.folder, dump.folder.parent):
        with pytest.raises(UsageError, match="is, or holds, the reference"):
            unpack_outputs(folder, target, index, dump, place)
    assert [tensor for tensor in read_dump(dump.folder).names() if ".in." in tensor]


def test_a_pipe_in_place_of_a_file_is_refused(ran, tmp_path):
    _, target, index, dump = ran
    folder = copy_of(ran, tmp_path)
    file = next(one for one in sorted((folder / "outputs").rglob("*")) if one.is_file())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DumpError, match="not a regular file"):
        unpack_outputs(folder, target, index, dump, tmp_path / "new")
