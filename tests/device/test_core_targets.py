"""The files of the core's targets, checked with the packages whose formats they are."""

from __future__ import annotations

import base64
import io
import json
import os
import textwrap
import unittest
import warnings
from unittest.mock import patch

import ml_dtypes
import numpy as np
import onnx
import pytest
from device_models import steps_of, write_dump
from onnx import TensorProto, helper, numpy_helper
from qeff_proxy.cli import main
from qeff_proxy.compare import compare_dumps
from qeff_proxy.device import PackOptions, import_recorded, load_target, pack_dump
from qeff_proxy.dump import DumpWriter, read_dump
from qeff_proxy.errors import DumpError

pytestmark = pytest.mark.one_home


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dump and every array that was handed to its writer."""
    arrays = {}
    folder = write_dump("gpt2", tmp_path_factory.mktemp("run") / "d", arrays=arrays)
    return read_dump(folder), arrays


def pack(dump, folder, name, *, part=None, **options):
    pack_dump(dump, folder, load_target(name, **options), PackOptions(parts=[part] if part else []))
    return folder / (part or "body")


def unpack(path, folder, name, **options):
    target = {key: options.pop(key) for key in ("model", "runner") if key in options}
    import_recorded(path, load_target(name, **target), folder, **options)
    return read_dump(folder)


def body_arrays(run, phase, index, side):
    return {
        name: array
        for (p, i, part, s, name), array in run[1].items()
        if (p, i, part, s) == (phase, index, "body", side)
    }


def assert_same(left, right):
    assert set(left) == set(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array, right[name], err_msg=name)


LABELS = [(phase, index) for phase, index, _, _ in steps_of("gpt2")]


# Polygraphy


def test_polygraphy_reads_what_is_written_for_it(run, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    place = pack(run[0], tmp_path / "p", "polygraphy")
    feeds = load_json(str(place / "inputs.json"))
    results = RunResults.load(str(place / "outputs.json"))["qeff-proxy"]
    assert len(feeds) == len(results) == len(LABELS)
    for (phase, index), feed, result in zip(LABELS, feeds, results, strict=True):
        assert_same(dict(feed), body_arrays(run, phase, index, "in"))
        assert_same(dict(result.items()), body_arrays(run, phase, index, "out"))


def save_with_polygraphy(run, folder):
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    feeds = [body_arrays(run, *step, "in") for step in LABELS]
    results = RunResults()
    results.add([body_arrays(run, *step, "out") for step in LABELS], runner_name="trt")
    folder.mkdir()
    save_json(feeds, str(folder / "inputs.json"))
    results.save(str(folder / "outputs.json"))
    return folder


def test_what_polygraphy_saves_is_read(run, tmp_path):
    place = save_with_polygraphy(run, tmp_path / "p")
    labels = [f"{phase}-{index:04d}" for phase, index in LABELS]
    unpack(place, tmp_path / "d", "polygraphy", like=run[0], steps=labels, runner="trt")
    comparison = compare_dumps(run[0], tmp_path / "d", tensors=["body.out.*"])
    assert comparison.passed
    assert len(comparison.steps) == len(LABELS)
    alone = unpack(place, tmp_path / "alone", "polygraphy")
    read = {
        str(tensor.index.graph_name): alone.array("prefill", 3, tensor.index.name)
        for tensor in alone.tensors.values()
        if tensor.index.name.direction == "in"
    }
    assert_same(read, body_arrays(run, *LABELS[3], "in"))


def test_iterations_are_never_counted_into_steps(run, tmp_path):
    place = save_with_polygraphy(run, tmp_path / "p")
    with pytest.raises(DumpError, match=r"do not say which of the 5 steps .* --steps prefill-0000"):
        unpack(place, tmp_path / "d", "polygraphy", like=run[0])
    assert not (tmp_path / "d").exists()


def test_polygraphy_gets_the_values_of_dtypes_it_does_not_know(tmp_path):
    from polygraphy.json import load_json

    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", {"x": values}, {"y": values})
    place = pack(read_dump(tmp_path / "d"), tmp_path / "p", "polygraphy")
    read = load_json(str(place / "inputs.json"))[0]["x"]
    assert read.dtype == np.float32
    assert read.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"lst": 3}',
        '{"lst": [["a", [3]]]}',
        '{"lst": [["a", [{"outputs": 3}]]]}',
        "nope",
        "[]",
    ]
    + [
        f'{{"lst": [["a", [{{"outputs": {{"x": {value}}}}}]]]}}'
        for value in ("3", '{"array": "?"}')
    ],
)
def test_what_polygraphy_never_wrote_is_refused(tmp_path, text):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(DumpError):
        unpack(tmp_path / "out.json", tmp_path / "d", "polygraphy")
    assert not (tmp_path / "d").exists()


def test_a_pickle_in_polygraphy_json_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    array = {"array": base64.b64encode(buffer.getvalue()).decode()}
    (tmp_path / "in.json").write_text(json.dumps([{"x": array}]))
    with pytest.raises(DumpError, match="declares object"):
        unpack(tmp_path / "in.json", tmp_path / "d", "polygraphy")


def header(descr="'<f4'", shape="(4,)"):
    """The header of a .npy array, version 1.0."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


HOSTILE_ARRAYS = {
    "negative sizes whose product is right": header(shape="(-1, -4)") + bytes(16),
    "a size that overflows, times 0": header(shape=f"({2**62}, 0)"),
    "sizes that overflow together, times 0": header(shape=f"({2**40}, 0, {2**40})"),
    "a size of 41 digits": header(shape=f"({10**40}, 0)"),
    "a size of 5000 digits": header(shape=f"({'9' * 5000},)"),
    "more dimensions than NumPy has": header(shape=str((1,) * 70)) + bytes(4),
    "a truth value as a size": header(shape="(True, 4)") + bytes(16),
    "elements of no bytes": header("'|V0'"),
    "an array in each element": header("('<f4', (2,))", "(2,)") + bytes(16),
    "an open bracket": header(shape="(4,") + bytes(16),
    "brackets in brackets": header("[" * 4000),
    "signs before signs": header("-" * 9000),
    "two bytes of a header": b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("array", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_a_hostile_array_in_polygraphy_json_is_refused_in_one_line(array, tmp_path, capsys):
    value = {"array": base64.b64encode(array).decode(), "polygraphy_class": "ndarray"}
    (tmp_path / "in.json").write_text(json.dumps([{"x": value}]))
    command = ["unpack", str(tmp_path / "in.json"), "--from", "polygraphy"]
    assert main([*command, "--output", str(tmp_path / "d")]) == 9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 1000
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "names", [["a\0b"], ["\x1b[31mred"], ["\u202eevil"], ["x", "X"], ["x" * 70000]]
)
def test_names_that_no_dump_can_have_leave_no_dump(names, tmp_path, capsys):
    array = {"array": base64.b64encode(header() + bytes(16)).decode()}
    (tmp_path / "in.json").write_text(json.dumps([dict.fromkeys(names, array)]))
    command = ["unpack", str(tmp_path / "in.json"), "--from", "polygraphy"]
    assert main([*command, "--output", str(tmp_path / "d")]) == 9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2100
    assert said[:-1].isprintable()
    assert not (tmp_path / "d").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DumpError, match="not a regular file"):
        unpack(tmp_path / "pipe", tmp_path / "d", "polygraphy")


# ONNX test data


@pytest.fixture
def onnx_model(tmp_path):
    """A model with two inputs in an order of its own, and a dump of it."""
    import onnxruntime

    graph = helper.make_graph(
        [helper.make_node("Sub", ["b", "a"], ["difference"])],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in ("b", "a")],
        [helper.make_tensor_value_info("difference", TensorProto.FLOAT, ["n", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "case" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    with DumpWriter(tmp_path / "dump", {}) as writer:
        for index in range(3):
            feed = {n: rng.standard_normal((index + 1, 2)).astype(np.float32) for n in ("a", "b")}
            (out,) = session.run(None, feed)
            writer.step("decode", index, "body", feed, {"difference": out})
    return path


def run_backend_tests(folder):
    """Run a case folder as ONNX's own test runner does, with ONNX Runtime as the backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports onnx.version
        import onnxruntime.backend
    from onnx.backend.test.case.test_case import TestCase as Case
    from onnx.backend.test.runner import Runner

    case = Case(
        name="test_dump", model_name="dump", url=None, model_dir=str(folder), model=None,
        data_sets=None, kind="simple", rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    # The runner would load ONNX's thousands of own cases; it is given this one.
    one = {"simple": [case]}
    with patch("onnx.backend.test.runner.load_model_tests", lambda kind: one.get(kind, [])):
        runner = Runner(onnxruntime.backend, __name__)
    suite = unittest.TestSuite(
        test(method)
        for test in runner.test_cases.values()
        for method in dir(test)
        if method.startswith("test_dump_cpu")
    )
    assert suite.countTestCases() == 1
    return unittest.TextTestRunner(stream=io.StringIO()).run(suite)


def test_onnx_test_data_passes_onnx_own_runner(onnx_model, tmp_path):
    data = pack(read_dump(tmp_path / "dump"), tmp_path / "p", "onnx", model=onnx_model)
    for number in range(3):
        (data / f"test_data_set_{number}").rename(onnx_model.parent / f"test_data_set_{number}")
    result = run_backend_tests(onnx_model.parent)
    assert result.wasSuccessful(), result.errors + result.failures


def test_onnx_own_runner_sees_a_wrong_output(onnx_model, tmp_path):
    data = pack(read_dump(tmp_path / "dump"), tmp_path / "p", "onnx", model=onnx_model)
    wrong = numpy_helper.from_array(np.ones((1, 2), np.float32), "difference")
    (data / "test_data_set_0" / "output_0.pb").write_bytes(wrong.SerializeToString())
    (data / "test_data_set_0").rename(onnx_model.parent / "test_data_set_0")
    assert not run_backend_tests(onnx_model.parent).wasSuccessful()


def test_onnx_test_data_holds_the_same_arrays_and_comes_back(run, tmp_path):
    place = pack(run[0], tmp_path / "o", "onnx")
    read = {}
    for file in sorted((place / "test_data_set_3").glob("input_*.pb")):
        tensor = onnx.load_tensor(file)
        read[tensor.name] = numpy_helper.to_array(tensor)
    assert_same(read, body_arrays(run, *LABELS[3], "in"))
    alone = unpack(place, tmp_path / "d", "onnx")
    assert alone.steps[3].label == "prefill-0003"
    name = "body.out.present_key.layer-01"
    np.testing.assert_array_equal(
        alone.array("prefill", 3, name), run[1][*LABELS[3], "body", "out", "present.1.key"]
    )


def test_onnx_dtypes_survive(tmp_path):
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int64, np.bool_]
    arrays = {f"x_{np.dtype(k).name}": np.array([0, 1, 1]).astype(k) for k in kinds}
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", arrays, {})
    back = unpack(pack(read_dump(tmp_path / "d"), tmp_path / "o", "onnx"), tmp_path / "b", "onnx")
    read = {name: back.array("prefill", 0, f"body.in.{name}") for name in arrays}
    assert_same(read, arrays)


def test_bad_onnx_test_data_is_refused(run, onnx_model, tmp_path):
    with pytest.raises(DumpError, match="lacks 'b'"):
        pack(run[0], tmp_path / "o", "onnx", model=onnx_model)
    with pytest.raises(DumpError, match="no test_data_set_N"):
        unpack(tmp_path, tmp_path / "d", "onnx")
    place = tmp_path / "bad" / "test_data_set_0"
    place.mkdir(parents=True)
    (place / "input_0.pb").write_bytes(b"\xff" * 40)
    with pytest.raises(DumpError, match="is not an ONNX tensor"):
        unpack(tmp_path / "bad", tmp_path / "d", "onnx")
    (place / "input_0.pb").write_bytes(b"\x08\x01\x10\x01\x42\x02\xff\xfe\x4a\x04" + bytes(4))
    with pytest.raises(DumpError, match="its name is not UTF-8"):
        unpack(tmp_path / "bad", tmp_path / "d", "onnx")
    outside = TensorProto(name="x", dims=[1], data_type=1)
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../etc/passwd")
    (place / "input_0.pb").write_bytes(outside.SerializeToString())
    with pytest.raises(DumpError, match="in another file"):
        unpack(tmp_path / "bad", tmp_path / "d", "onnx")


# The command


@pytest.mark.parametrize("name", ["npy", "npz", "onnx", "polygraphy"])
def test_the_command_packs_and_refuses_a_folder_that_is_not_empty(run, tmp_path, capsys, name):
    dump, there = str(run[0].folder), str(tmp_path / "there")
    assert main(["pack", dump, "--for", name, "--output", there, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"written": there, "target": name, "cache": "reference", "groups": {"body": 5}}
    assert main(["pack", dump, "--for", name, "--output", there]) == 9
    assert "is not empty" in capsys.readouterr().err
    command = ["pack", dump, "--for", name, "--output", str(tmp_path / "x")]
    assert main([*command, "--part", "head"]) == 9
    assert "has no part 'head'. Choose one of embedding, body, lm_head" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_part_without_tensors_is_refused(tmp_path, capsys):
    write_dump("gpt2", tmp_path / "d", tensors=("embedding.*",))
    command = ["pack", str(tmp_path / "d"), "--for", "npy", "--output", str(tmp_path / "out")]
    assert main(command) == 9
    assert "holds no tensor of the body part" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--part", "embedding"]) == 0


def test_onnx_test_data_that_lacks_a_file_is_refused(run, tmp_path):
    place = pack(run[0], tmp_path / "data", "onnx")
    (place / "test_data_set_1" / "input_0.pb").unlink()
    with pytest.raises(DumpError, match=r"lacks input_0\.pb and has input_"):
        unpack(place, tmp_path / "back", "onnx")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--dtype", "nothing*=float16"], "--dtype nothing* matches no tensor"),
        (["--dtype", "x=float17"], "there is no dtype 'float17'"),
        (["--dtype", "float16"], "is not GLOB=DTYPE"),
        (["--layout", "present*=B,S,H,D,E"], "is no order of axes"),
        (["--layout", "present*=B,S,D"], "has 3 axes, and present.0.key has 4"),
        (["--cache", "device"], "carries no cache from one to the next"),
        (["--ctx-len", "32"], "does not lie in an export"),
        (["--export", "x"], "--export is for fixed shapes"),
        (["--for", "npy", "--model", "x.onnx"], "npy has no use for --model"),
        (["--for", "acme"], "there is no target 'acme'. Known are"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(run, options, problem, tmp_path, capsys):
    command = ["pack", str(run[0].folder), "--for", "onnx", "--output", str(tmp_path / "p")]
    assert main([*command, *options]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, capsys):
    values = {"x": np.array([1.0, 70000.0], np.float32), "y": np.array([2**40])}
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", values, {})
    command = ["pack", str(tmp_path / "d"), "--for", "npy", "--output", str(tmp_path / "p")]
    assert main([*command, "--dtype", "x=float16"]) == 9
    assert (
        "x of prefill-0000 has 70000.0 at [1], which float16 cannot hold" in capsys.readouterr().err
    )
    assert main([*command, "--dtype", "y=int32"]) == 9
    assert "y of prefill-0000 has 1099511627776 at [0], which int32" in capsys.readouterr().err


def test_a_package_brings_a_target(run, tmp_path, site_packages, capsys):
    source = """
        from qeff_proxy.device import Target

        class Acme(Target):
            name = "acme"

            def write_group(self, group, read):
                names = [tensor.name for run in group.runs for tensor, _ in read(run, "in")]
                (group.folder / "names").write_text(f"{len(group.runs)} {len(names)}")
                return ["acme-run"]

            def find_outputs(self, group):
                yield from ()
    """
    site_packages.install_metadata(
        "acme-runner", b"[qeff_proxy.device_targets]\nacme = acme_runner:Acme\n"
    )
    (site_packages.folder / "acme_runner.py").write_text(textwrap.dedent(source))
    command = ["pack", str(run[0].folder), "--output", str(tmp_path / "out"), "--for"]
    assert main([*command, "acme"]) == 0
    assert (tmp_path / "out" / "names").read_text() == "5 35"
    assert (tmp_path / "out" / "run.sh").read_text().endswith("acme-run\n")
    assert main([*command, "acm"]) == 2
    assert "there is no target 'acm'. Known are acme, " in capsys.readouterr().err
