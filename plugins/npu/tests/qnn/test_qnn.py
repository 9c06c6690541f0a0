"""Compiled for HTP wholly, and run in its emulator: near at every layer, at any position."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, BackendError, UsageError
from qeff_proxy.parts import TensorSpec
from qeff_proxy_npu.qnn.backend import QnnBackend
from qeff_proxy_npu.qnn.diagnosis import reasons_in
from qeff_proxy_npu.qnn.options import OPTIONS, SOCS, QnnOptions
from qeff_proxy_npu.qnn.process import CrashError, RefusalError, Worker
from qeff_proxy_npu.qnn.session import _Binary

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

pytestmark = pytest.mark.one_home

CASES = [
    ("gpt2", "body", {"batch": 1, "query": 3, "past": 5}),
    ("gpt2", "body", {"batch": 1, "query": 1, "past": 5}),
    ("long-gpt2", "body", {"batch": 1, "query": 1, "past": 2000}),
    ("llama", "body", {"batch": 2, "query": 3, "past": 5}),
    ("llama", "body", {"batch": 1, "query": 1, "past": 2000}),
    ("bert", "body", {"batch": 1, "sequence": 9}),
    ("wav2vec2", "body", {"batch": 1, "samples": 999}),
    ("whisper", "encoder", {"batch": 1}),
    ("whisper", "body", {"batch": 1, "query": 4, "past": 0}),
    ("llava", "vision", {"batch": 1}),
]


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    wide = reference.astype(np.float64)
    noise = ((wide - found) ** 2).sum()
    return float(10 * np.log10((wide**2).sum() / max(noise, 1e-300)))


def options_for(sizes: dict[str, int]) -> CompileOptions:
    return CompileOptions(prefill_seq_len=4, ctx_len=2048 if sizes.get("past", 0) > 999 else 256)


@pytest.mark.parametrize(("name", "part_name", "sizes"), CASES)
def test_every_node_is_on_htp_and_every_output_near(
    name: str,
    part_name: str,
    sizes: dict[str, int],
    make_export: Any,
    feeds_of: Any,
    tmp_path: Path,
) -> None:
    export = make_export(name)
    part = export.part(part_name)
    feeds = feeds_of(part, sizes)
    plain = onnxruntime.InferenceSession(
        export.folder / part.file, providers=["CPUExecutionProvider"]
    )
    expected = plain.run(None, feeds)
    session = QnnBackend().open(export, part, options_for(sizes), tmp_path)  # compiles as it runs
    found = session.run(feeds)
    session.close()
    for spec, reference in zip(part.outputs, expected, strict=True):
        assert found[spec.name].shape == reference.shape
        # Half precision leaves its mark: a run on the CPU would be nearer than that.
        assert 40 < sqnr(reference, found[spec.name]) < 90, spec.name
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert report["on_cpu"] == []
    assert report["on_htp"] > 20
    assert report["bytes"] > 0
    (path,) = [one for one in tmp_path.glob("*.onnx") if not one.name.endswith(".host.onnx")]
    assert {node.op_type for node in onnx.load(path).graph.node} == {"EPContext"}


def one_part(tmp_path: Path, nodes: list[Any], dtype: int, constants: list[Any]) -> Any:
    """An export of one part, ``body``: ``x [1, 8]`` to ``y [1, 8]``."""
    shape = [1, 1, 4, 8] if constants else [1, 8]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, [1, 8])],
        [helper.make_tensor_value_info("y", dtype, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "body.onnx")
    name = "float32" if dtype == TensorProto.FLOAT else "int32"
    part = ExportedPart(
        "body",
        "body.onnx",
        None,
        "",
        (TensorSpec("x", name, ("batch", 8)),),
        (TensorSpec("y", name, tuple(shape)),),
    )

    class Folder:
        folder = tmp_path
        files = MappingProxyType({})
        dtype = "float32"

    return Folder(), part


def refused_part(tmp_path: Path) -> Any:
    scopes = "['', 'model', 'model.layers.3', 'model.layers.3.mlp']"
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"], name="first"),
        helper.make_node("Erf", ["a"], ["b"], name="bell"),
        helper.make_node("Mul", ["b", "x"], ["y"], name="last"),
    ]
    entry = nodes[1].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", scopes
    return one_part(tmp_path, nodes, TensorProto.FLOAT, [])


def test_a_refused_node_is_named_with_its_layer_and_nothing_falls_back(tmp_path: Path) -> None:
    export, part = refused_part(tmp_path)
    folder = tmp_path / "compiled-for"
    folder.mkdir()
    options = CompileOptions()
    session = QnnBackend().open(export, part, options, folder)
    with pytest.raises(BackendError, match=r"1 of 3 nodes.*Erf node bell of layer 3 .*not supp"):
        session.run({"x": np.ones((1, 8), np.float32)})
    session.close()
    assert list(folder.iterdir()) == []
    log = tmp_path / "compiled" / "logs" / "qnn-body.log"
    assert "Erf node bell" in log.read_text()

    loose = replace(options, backend={"strict": False})
    session = QnnBackend().open(export, part, loose, folder)
    x = np.linspace(-1, 1, 8, dtype=np.float32)[None]
    found = session.run({"x": x})["y"]
    session.close()
    assert np.abs(found - [[1, 1, 1, 1, 1, 1, 1, 1]]).max() > 0.1  # it did something
    report = json.loads(next(folder.glob("*.json")).read_text())
    (left,) = report["on_cpu"]
    assert (left["operator"], left["name"], left["layer"]) == ("Erf", "bell", 3)
    assert "not supported" in left["reason"]
    assert report["on_htp"] == 2


def test_a_graph_that_breaks_the_compiler_gives_an_error_that_names_the_node(
    tmp_path: Path,
) -> None:
    """A gathering with a constant index of rank 5, as masks built inside a graph have it."""
    places = np.broadcast_arrays(np.zeros((1, 1, 4, 8), np.int64), np.arange(8)[None, None, None])
    index = numpy_helper.from_array(np.ascontiguousarray(np.stack(places, -1)), "index")
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"], name="twice"),
        helper.make_node("GatherND", ["a", "index"], ["y"], name="pick"),
    ]
    export, part = one_part(tmp_path, nodes, TensorProto.INT32, [index])
    session = QnnBackend().open(export, part, CompileOptions(), tmp_path)
    with pytest.raises(BackendError, match=r"fails on the body part at GatherND node pick") as info:
        session.run({"x": np.ones((1, 8), np.int32)})
    assert "qnn-body.log" in str(info.value)
    session.close()


@pytest.mark.parametrize(
    ("number", "words"), [(11, "segmentation fault"), (9, "memory runs out"), (6, "abort")]
)
def test_a_process_that_dies_is_an_error_that_says_how(
    number: int, words: str, tmp_path: Path
) -> None:
    worker = Worker(tmp_path / "a.log", timeout=60)
    os.kill(worker._process.pid, number)
    with pytest.raises(CrashError, match=words) as info:
        worker.ask("close", key="nothing")
    assert "a.log" in str(info.value)
    worker.close()


def test_a_request_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a.log", timeout=60)
    worker._timeout = 0.2
    os.kill(worker._process.pid, 19)  # it stands still
    with pytest.raises(CrashError, match=r"longer than 0.2 s"):
        worker.ask("close", key="nothing")
    worker.close()


def test_a_worker_without_memory_to_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="log"):
        Worker(tmp_path / "a.log", timeout=60, memory_mb=40)


@pytest.fixture(scope="module")
def compiled_demo(make_export: Any, shared_home: Path) -> Any:
    export = make_export("gpt2")
    return compile_export(export, "qnn", CompileOptions(prefill_seq_len=4, ctx_len=16))


def test_compiling_makes_prefill_and_decode(compiled_demo: Any) -> None:
    names = {path.name for path in compiled_demo.folder.iterdir()}
    for name in ("body.batch-1.query-4.past-12", "body.batch-1.query-1.past-15"):
        assert {f"{name}.onnx", f"{name}_qnn.bin", f"{name}.json"} <= names
    assert "lm_head.onnx" in names  # on the host, in ONNX Runtime


def test_a_binary_of_another_version_or_a_damaged_one_is_refused(
    compiled_demo: Any, feeds_of: Any, tmp_path: Path
) -> None:
    part = compiled_demo.export.part("body")
    feeds = feeds_of(part, {"batch": 1, "query": 1, "past": 3})
    for path in compiled_demo.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "body.batch-1.query-1.past-15"
    (tmp_path / f"{name}_qnn.bin").write_bytes(b"no binary")
    session = QnnBackend().open(compiled_demo.export, part, compiled_demo.options, tmp_path)
    with pytest.raises(BackendError, match=r"log"):
        session.run(feeds)
    session.close()
    manifest = tmp_path / f"{name}.json"
    text = manifest.read_text()
    version = QnnBackend().versions()["onnxruntime-qnn"]
    manifest.write_text(text.replace(version, "2.6.0"))
    session = QnnBackend().open(compiled_demo.export, part, compiled_demo.options, tmp_path)
    with pytest.raises(BackendError, match=rf"2.6.0.*{version}.* is installed. Compile again"):
        session.run(feeds)
    session.close()


def test_no_space_is_told_before_the_work_begins(
    make_export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export: Export = make_export("gpt2")
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArtifactError, match="MiB free"):
        QnnBackend().compile(
            export, export.part("body"), CompileOptions(prefill_seq_len=4, ctx_len=16), tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compilation_leaves_the_earlier_one(compiled_demo: Any) -> None:
    before = {path: path.read_bytes() for path in compiled_demo.folder.iterdir()}
    options = replace(compiled_demo.options, backend={"memory_mb": 40})
    with pytest.raises(BackendError):
        compile_export(compiled_demo.export, "qnn", options)
    assert {path: path.read_bytes() for path in compiled_demo.folder.iterdir()} == before
    again = compile_export(compiled_demo.export, "qnn", compiled_demo.options)
    assert again.was_there


def test_sessions_close_their_process(compiled_demo: Any, feeds_of: Any) -> None:
    part = compiled_demo.export.part("body")
    with open_sessions(compiled_demo) as sessions:
        sessions["body"].run(feeds_of(part, {"batch": 1, "query": 1, "past": 3}))
        process = sessions["body"]._worker._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"soc": "SM1"}, "soc is 'SM1'. It must be one of SM8350"),
        ({"htp_arch": 70}, "htp_arch is 70. It must be one of 68"),
        ({"htp_arch": "v"}, "htp_arch is 0"),
        ({"precision": "a2"}, "precision is 'a2'"),
        ({"strict": 1}, "strict is 1. It must be true or false"),
        ({"optimization": 4}, "optimization is 4"),
        ({"timeout": 0}, "timeout is 0"),
    ],
)
def test_options_that_cannot_be_right(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as info:
        load_backend("qnn").check_options("qnn", CompileOptions(backend=given))
    assert message in str(info.value)


def test_options_name_every_chip() -> None:
    assert all(soc in OPTIONS["soc"] for soc in SOCS)
    assert set(load_backend("qnn").options) == set(OPTIONS)
    assert QnnOptions.of({"soc": "sm8650"}).provider()["htp_arch"] == "75"
    assert QnnOptions.of({"htp_arch": "v79"}).htp_arch == 79


def test_reasons_are_read_from_the_log() -> None:
    log = (
        "[V] Validation FAILED for 1 nodes in OrtNodeUnit (Erf) :\n"
        "\tOperator type: Erf Node name: bell Node index: 1\n"
        "\tREASON : Operators of type `Erf` are not supported\n"
    )
    assert reasons_in(log) == {"bell": "Operators of type `Erf` are not supported"}


def test_ctrl_c_is_for_the_process_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal sends it to both; closing a session then must not hide it."""
    worker = Worker(tmp_path / "log", timeout=120)
    worker._process.send_signal(signal.SIGINT)
    with pytest.raises(RefusalError, match="unknown"):
        worker.ask("close", key="unknown")

    def interrupted(_stream: object) -> None:
        raise KeyboardInterrupt

    binary = object.__new__(_Binary)
    binary._worker, binary._key = worker, "any"
    with monkeypatch.context() as patch:
        patch.setattr("qeff_proxy_npu.qnn.process.read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.ask("close", key="another")
    binary.close()
    worker.close()
    assert worker._process.returncode == -signal.SIGKILL
