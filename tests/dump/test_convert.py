"""Conversions, checked with the packages whose formats they are."""

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
from onnx import TensorProto, helper, numpy_helper
from qeff_proxy.cli import main
from qeff_proxy.compare import compare_dumps
from qeff_proxy.dump import DumpWriter, read_dump
from qeff_proxy.dump.convert import ConversionSource, onnx_data, polygraphy
from qeff_proxy.errors import DumpError


@pytest.fixture
def source(delta_run):
    return ConversionSource(read_dump(delta_run.folder))


def body_arrays(run, phase, index, side):
    return {
        name: array
        for (p, i, part, s, name), array in run.arrays.items()
        if (p, i, part, s) == (phase, index, "body", side)
    }


def assert_same(left, right):
    assert set(left) == set(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def steps_of(run):
    return [("prefill", 0), ("prefill", 1), *[("decode", i) for i in range(4)]]


# Polygraphy


def test_polygraphy_reads_what_is_written_for_it(source, delta_run, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    inputs, outputs = polygraphy.export_dump(source, tmp_path / "p")
    feeds = load_json(str(inputs))
    results = RunResults.load(str(outputs))["qeff-proxy"]
    assert len(feeds) == len(results) == 6
    for (phase, index), feed, result in zip(steps_of(delta_run), feeds, results, strict=True):
        assert_same(dict(feed), body_arrays(delta_run, phase, index, "in"))
        assert_same(dict(result.items()), body_arrays(delta_run, phase, index, "out"))


def test_what_polygraphy_saves_is_read(source, delta_run, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    feeds = [body_arrays(delta_run, *step, "in") for step in steps_of(delta_run)]
    results = RunResults()
    results.add([body_arrays(delta_run, *s, "out") for s in steps_of(delta_run)], runner_name="trt")
    (tmp_path / "p").mkdir()
    save_json(feeds, str(tmp_path / "p" / "inputs.json"))
    results.save(str(tmp_path / "p" / "outputs.json"))
    polygraphy.import_dump(tmp_path / "p", tmp_path / "d", like=source, runner="trt")
    comparison = compare_dumps(delta_run.folder, tmp_path / "d", tensors=["body.*"])
    assert comparison.passed
    assert len(comparison.steps) == 6


def test_polygraphy_gets_the_values_of_dtypes_it_does_not_know(tmp_path):
    from polygraphy.json import load_json

    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", {"x": values}, {"y": values})
    inputs, _ = polygraphy.export_dump(ConversionSource(read_dump(tmp_path / "d")), tmp_path / "p")
    read = load_json(str(inputs))[0]["x"]
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
        polygraphy.import_dump(tmp_path / "out.json", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_pickle_in_polygraphy_json_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    array = {"array": base64.b64encode(buffer.getvalue()).decode()}
    (tmp_path / "in.json").write_text(json.dumps([{"x": array}]))
    with pytest.raises(DumpError, match="declares object"):
        polygraphy.import_dump(tmp_path / "in.json", tmp_path / "d")


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
    command = ["convert", str(tmp_path / "in.json"), str(tmp_path / "d"), "--from", "polygraphy"]
    assert main(command) == 9
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
    command = ["convert", str(tmp_path / "in.json"), str(tmp_path / "d"), "--from", "polygraphy"]
    assert main(command) == 9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2100
    assert said[:-1].isprintable()
    assert not (tmp_path / "d").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DumpError, match="not a regular file"):
        polygraphy.import_dump(tmp_path / "pipe", tmp_path / "d")


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
    data = tmp_path / "data"
    onnx_data.export_dump(ConversionSource(read_dump(tmp_path / "dump")), data, model=onnx_model)
    for number in range(3):
        (data / f"test_data_set_{number}").rename(onnx_model.parent / f"test_data_set_{number}")
    result = run_backend_tests(onnx_model.parent)
    assert result.wasSuccessful(), result.errors + result.failures


def test_onnx_own_runner_sees_a_wrong_output(onnx_model, tmp_path):
    data = tmp_path / "data"
    onnx_data.export_dump(ConversionSource(read_dump(tmp_path / "dump")), data, model=onnx_model)
    wrong = numpy_helper.from_array(np.ones((1, 2), np.float32), "difference")
    (data / "test_data_set_0" / "output_0.pb").write_bytes(wrong.SerializeToString())
    (data / "test_data_set_0").rename(onnx_model.parent / "test_data_set_0")
    assert not run_backend_tests(onnx_model.parent).wasSuccessful()


def test_onnx_test_data_holds_the_same_arrays_and_comes_back(source, delta_run, tmp_path):
    assert onnx_data.export_dump(source, tmp_path / "o") == 6
    read = {}
    for file in sorted((tmp_path / "o" / "test_data_set_3").glob("input_*.pb")):
        tensor = onnx.load_tensor(file)
        read[tensor.name] = numpy_helper.to_array(tensor)
    assert_same(read, body_arrays(delta_run, "decode", 1, "in"))
    onnx_data.import_dump(tmp_path / "o", tmp_path / "d", like=source)
    assert compare_dumps(delta_run.folder, tmp_path / "d", tensors=["body.*"]).passed


def test_onnx_dtypes_survive(tmp_path):
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int64, np.bool_]
    arrays = {f"x_{np.dtype(k).name}": np.array([0, 1, 1]).astype(k) for k in kinds}
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", arrays, {})
    onnx_data.export_dump(ConversionSource(read_dump(tmp_path / "d")), tmp_path / "o")
    onnx_data.import_dump(tmp_path / "o", tmp_path / "back")
    back = read_dump(tmp_path / "back")
    read = {name: back.array("prefill", 0, f"body.in.{name}") for name in arrays}
    assert_same(read, arrays)


def test_bad_onnx_test_data_is_refused(source, onnx_model, tmp_path):
    with pytest.raises(DumpError, match="lacks 'b'"):
        onnx_data.export_dump(source, tmp_path / "o", model=onnx_model)
    with pytest.raises(DumpError, match="no test_data_set_N"):
        onnx_data.import_dump(tmp_path, tmp_path / "d")
    place = tmp_path / "bad" / "test_data_set_0"
    place.mkdir(parents=True)
    (place / "input_0.pb").write_bytes(b"\xff" * 40)
    with pytest.raises(DumpError, match="is not an ONNX tensor"):
        onnx_data.import_dump(tmp_path / "bad", tmp_path / "d")
    outside = TensorProto(name="x", dims=[1], data_type=1)
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../etc/passwd")
    (place / "input_0.pb").write_bytes(outside.SerializeToString())
    with pytest.raises(DumpError, match="in another file"):
        onnx_data.import_dump(tmp_path / "bad", tmp_path / "d")


# The command


@pytest.mark.parametrize("kind", ["qaic", "onnx", "polygraphy"])
def test_the_command_converts_there_and_back(delta_run, tmp_path, capsys, kind):
    dump, there, back = (str(p) for p in (delta_run.folder, tmp_path / "there", tmp_path / "back"))
    assert main(["convert", dump, there, "--to", kind]) == 0
    assert main(["convert", there, back, "--from", kind, "--like", dump, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["steps"] == 6
    assert main(["compare", dump, back, "--tensors", "body.*"]) == 0
    assert main(["convert", dump, there, "--to", kind]) == 9
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", dump, str(tmp_path / "x"), "--to", kind, "--part", "head"]) == 9


@pytest.mark.parametrize("kind", ["qaic", "onnx", "polygraphy"])
def test_a_part_without_tensors_is_refused(make_run, tmp_path, kind, capsys):
    make_run(tmp_path / "d", tensors=("embedding.*",))
    command = ["convert", str(tmp_path / "d"), str(tmp_path / "out"), "--to", kind]
    assert main(command) == 9
    assert "holds no tensor of the body part" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--part", "embedding"]) == 0


def test_onnx_test_data_that_lacks_a_file_is_refused(source, tmp_path):
    onnx_data.export_dump(source, tmp_path / "data")
    (tmp_path / "data" / "test_data_set_1" / "input_0.pb").unlink()
    with pytest.raises(DumpError, match=r"lacks input_0\.pb and has input_"):
        onnx_data.import_dump(tmp_path / "data", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--to", "qaic", "--dtype", "x=float32"),
        ("--to", "onnx", "--runner", "x"),
        ("--to", "polygraphy", "--model", "x.onnx"),
        ("--from", "polygraphy", "--dtype", "x=int8"),
        ("--from", "onnx", "--dtype", "x=int8"),
        ("--to", "qaic", "--like", "dump"),
    ],
)
def test_an_option_that_a_format_has_no_use_for_is_refused(arguments, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]) == 2
    assert f"has no use for {arguments[2]}" in capsys.readouterr().err


def test_a_package_brings_a_format(delta_run, tmp_path, site_packages, capsys):
    source = """
        def export_dump(source, folder, *, runner=None):
            folder.mkdir()
            (folder / "names").write_text(f"{runner} {len(source.steps())}")
    """
    site_packages.install_metadata("acme-dumps", b"[qeff_proxy.dump_formats]\nacme = acme_dumps\n")
    (site_packages.folder / "acme_dumps.py").write_text(textwrap.dedent(source))
    command = ["convert", str(delta_run.folder), str(tmp_path / "out"), "--to"]
    assert main([*command, "acme", "--runner", "x"]) == 0
    assert (tmp_path / "out" / "names").read_text() == "x 6"
    assert main([*command, "acme", "--model", "x.onnx"]) == 2
    assert "It takes --runner" in capsys.readouterr().err
    assert main([*command, "acm"]) == 2
    assert "there is no format 'acm'. Known are acme, onnx, polygraphy" in capsys.readouterr().err
