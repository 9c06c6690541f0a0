"""Conversions, checked with the packages whose formats they are."""

from __future__ import annotations

import io
import json
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
from qeff_proxy.dump.convert import (
    ConversionSource,
    export_onnx,
    export_polygraphy,
    export_qaic,
    import_onnx,
    import_polygraphy,
    import_qaic,
)
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

    inputs, outputs = export_polygraphy(source, tmp_path / "p")
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
    save_json(feeds, str(tmp_path / "in.json"))
    results.save(str(tmp_path / "out.json"))
    import_polygraphy(
        tmp_path / "in.json", tmp_path / "out.json", tmp_path / "d", like=source, runner="trt"
    )
    comparison = compare_dumps(delta_run.folder, tmp_path / "d", tensors=["body.*"])
    assert comparison.passed
    assert len(comparison.steps) == 6


def test_polygraphy_gets_the_values_of_dtypes_it_does_not_know(tmp_path):
    from polygraphy.json import load_json

    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", {"x": values}, {"y": values})
    inputs, _ = export_polygraphy(ConversionSource(read_dump(tmp_path / "d")), tmp_path / "p")
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
        import_polygraphy(None, tmp_path / "out.json", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_pickle_in_polygraphy_json_is_refused(tmp_path):
    import base64

    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    array = {"array": base64.b64encode(buffer.getvalue()).decode()}
    (tmp_path / "in.json").write_text(json.dumps([{"x": array}]))
    with pytest.raises(DumpError, match="declares object"):
        import_polygraphy(tmp_path / "in.json", None, tmp_path / "d")


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
    export_onnx(ConversionSource(read_dump(tmp_path / "dump")), data, model=onnx_model)
    for number in range(3):
        (data / f"test_data_set_{number}").rename(onnx_model.parent / f"test_data_set_{number}")
    result = run_backend_tests(onnx_model.parent)
    assert result.wasSuccessful(), result.errors + result.failures


def test_onnx_own_runner_sees_a_wrong_output(onnx_model, tmp_path):
    data = tmp_path / "data"
    export_onnx(ConversionSource(read_dump(tmp_path / "dump")), data, model=onnx_model)
    wrong = numpy_helper.from_array(np.ones((1, 2), np.float32), "difference")
    (data / "test_data_set_0" / "output_0.pb").write_bytes(wrong.SerializeToString())
    (data / "test_data_set_0").rename(onnx_model.parent / "test_data_set_0")
    assert not run_backend_tests(onnx_model.parent).wasSuccessful()


def test_onnx_test_data_holds_the_same_arrays_and_comes_back(source, delta_run, tmp_path):
    assert export_onnx(source, tmp_path / "o") == 6
    read = {}
    for file in sorted((tmp_path / "o" / "test_data_set_3").glob("input_*.pb")):
        tensor = onnx.load_tensor(file)
        read[tensor.name] = numpy_helper.to_array(tensor)
    assert_same(read, body_arrays(delta_run, "decode", 1, "in"))
    import_onnx(tmp_path / "o", tmp_path / "d", like=source)
    assert compare_dumps(delta_run.folder, tmp_path / "d", tensors=["body.*"]).passed


def test_onnx_dtypes_survive(tmp_path):
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.int64, np.bool_]
    arrays = {f"x_{np.dtype(k).name}": np.array([0, 1, 1]).astype(k) for k in kinds}
    with DumpWriter(tmp_path / "d", {}) as writer:
        writer.step("prefill", 0, "body", arrays, {})
    export_onnx(ConversionSource(read_dump(tmp_path / "d")), tmp_path / "o")
    import_onnx(tmp_path / "o", tmp_path / "back")
    back = read_dump(tmp_path / "back")
    read = {name: back.array("prefill", 0, f"body.in.{name}") for name in arrays}
    assert_same(read, arrays)


def test_bad_onnx_test_data_is_refused(source, onnx_model, tmp_path):
    with pytest.raises(DumpError, match="lacks 'b'"):
        export_onnx(source, tmp_path / "o", model=onnx_model)
    with pytest.raises(DumpError, match="no test_data_set_N"):
        import_onnx(tmp_path, tmp_path / "d")
    place = tmp_path / "bad" / "test_data_set_0"
    place.mkdir(parents=True)
    (place / "input_0.pb").write_bytes(b"\xff" * 40)
    with pytest.raises(DumpError, match="is not an ONNX tensor"):
        import_onnx(tmp_path / "bad", tmp_path / "d")
    outside = TensorProto(name="x", dims=[1], data_type=1)
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../etc/passwd")
    (place / "input_0.pb").write_bytes(outside.SerializeToString())
    with pytest.raises(DumpError, match="in another file"):
        import_onnx(tmp_path / "bad", tmp_path / "d")


# aic_batch_io.json


def test_qaic_files_are_what_the_json_says_and_come_back(source, delta_run, tmp_path):
    path = export_qaic(source, tmp_path / "q")
    sets = json.loads(path.read_text())["IO-files"]
    assert len(sets) == 6
    for (phase, index), entries in zip(steps_of(delta_run), sets, strict=True):
        for side in ("in", "out"):
            expected = body_arrays(delta_run, phase, index, side)
            read = {
                e["map-to"]: np.fromfile(
                    path.parent / e["path"], expected[e["map-to"]].dtype
                ).reshape(e["dims"])
                for e in entries
                if e["io-direction"] == side
            }
            assert_same(read, expected)
            assert all(
                e["elem-size"] * np.prod(e["dims"]) == (path.parent / e["path"]).stat().st_size
                for e in entries
            )
    import_qaic(path, tmp_path / "d")
    assert compare_dumps(delta_run.folder, tmp_path / "d", tensors=["body.*"]).passed


def write_like_qefficient(folder):
    """Files as QEfficient leaves them: two chunks in one folder, and no dims for some."""
    arrays = {
        "input_ids": np.array([[5]], np.int64),
        "past_key.0": np.zeros((1, 1, 2, 1), np.float16),
        "logits": np.ones((1, 1, 3), np.float32),
        "past_key.0_RetainedState": np.ones((1, 1, 2, 1), np.float16),
    }
    sets = []
    for place in ("prefill", "prefill", "decode"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        entries = []
        for name, array in arrays.items():
            array.tofile(folder / place / f"{name}.raw")
            entry = {
                "path": f"{place}/{name}.raw",
                "io-direction": "out" if name in ("logits", "past_key.0_RetainedState") else "in",
                "elem-size": array.itemsize,
                "map-to": name,
            }
            if name != "logits":
                entry["dims"] = array.shape
            entries.append(entry)
        sets.append(entries)
    path = folder / "aic_batch_io.json"
    path.write_text(json.dumps({"IO-files": sets}, indent=True))
    return path


def test_what_qefficient_wrote_is_read(tmp_path):
    import_qaic(write_like_qefficient(tmp_path / "q"), tmp_path / "d")
    dump = read_dump(tmp_path / "d")
    # The first chunk's files were written over by the second's.
    assert [step.label for step in dump.steps] == ["prefill-0000", "decode-0000"]
    assert dump.array("decode", 0, "body.in.input_ids").dtype == np.int64
    assert dump.array("decode", 0, "body.out.present_key.layer-00").dtype == np.float16
    assert dump.array("decode", 0, "body.in.past_key_values_key.layer-00").shape == (1, 1, 2, 1)
    assert dump.array("decode", 0, "body.out.logits").tolist() == [1, 1, 1]


def test_the_dtypes_of_raw_files_can_be_told(tmp_path):
    path = write_like_qefficient(tmp_path / "q")
    import_qaic(path, tmp_path / "d", dtypes={"*.key": "bfloat16"})
    dtype = read_dump(tmp_path / "d").array("decode", 0, "body.out.present_key.layer-00").dtype
    assert dtype == ml_dtypes.bfloat16
    with pytest.raises(DumpError, match="elements of 4 bytes"):
        import_qaic(path, tmp_path / "e", dtypes={"logits": "int8"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"path": "../secret.raw"}, "outside"),
        ({"path": "/etc/passwd"}, "outside"),
        ({"path": "prefill/nothing.raw"}, "cannot be read"),
        ({"dims": [3]}, "bytes, not those of"),
        ({"dims": [-1]}, "not a shape"),
        ({"elem-size": 3}, "are not"),
        ({"elem-size": "4"}, "lacks one of"),
        ({"io-direction": "sideways"}, "direction"),
    ],
)
def test_a_hostile_aic_batch_io_is_refused(tmp_path, change, problem):
    path = write_like_qefficient(tmp_path / "q")
    (tmp_path / "secret.raw").write_bytes(b"12345678")
    value = json.loads(path.read_text())
    value["IO-files"][2][0] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(DumpError, match=problem):
        import_qaic(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


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
    export_onnx(source, tmp_path / "data")
    (tmp_path / "data" / "test_data_set_1" / "input_0.pb").unlink()
    with pytest.raises(DumpError, match=r"lacks input_0\.pb and has input_"):
        import_onnx(tmp_path / "data", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--to", "qaic", "--dtype", "x=float32"),
        ("--to", "onnx", "--runner", "x"),
        ("--to", "polygraphy", "--model", "x.onnx"),
        ("--from", "onnx", "--dtype", "x=int8"),
        ("--to", "qaic", "--like", "dump"),
    ],
)
def test_an_option_that_a_format_has_no_use_for_is_refused(arguments, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]) == 2
    assert f"has no use for {arguments[2]}" in capsys.readouterr().err
