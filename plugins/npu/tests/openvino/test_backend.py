"""The ``openvino`` backend: what the suite of all backends does not ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import openvino
import pytest
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.testing.backend_parts import Reference, feeds_of, make_export, unknown_operator
from qeff_proxy.verify.options import VerifyOptions
from qeff_proxy.verify.verify_model import verify_model

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export

pytestmark = pytest.mark.one_home


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return make_export(tmp_path / "export", integer_bits=32)


def run_body(export: Export, options: CompileOptions) -> dict[str, Any]:
    body = export.part("body")
    with open_sessions(compile_export(export, "openvino", options)) as sessions:
        return sessions["body"].run(feeds_of(body, query=4))


def test_importing_it_sends_nothing_and_writes_nothing(tmp_path: Path) -> None:
    """OpenVINO's own import sends a message to its makers and keeps an id in the home folder."""
    code = (
        "import socket, sys\n"
        "def refuse(*arguments): raise SystemExit('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import qeff_proxy_npu.openvino.backend as backend\n"
        "print(backend.OpenVinoBackend().devices())\n"
        "print([n for n in sys.modules if n.startswith('openvino_telemetry')])\n"
        "import openvino_telemetry"  # what was hidden is there again
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    devices, telemetry = done.stdout.splitlines()
    assert "CPU (" in devices
    assert telemetry == "[]"
    assert not (tmp_path / "home" / "intel").exists()


@pytest.mark.parametrize("options", [{}, {"static_shapes": True}])
def test_verify_passes(options: dict[str, Any], demo_export: Path) -> None:
    """The trained checkpoint, every layer, in chunks and steps."""
    chosen = VerifyOptions(
        max_new_tokens=3,
        compile=CompileOptions(prefill_seq_len=4, ctx_len=64),
        backends={"openvino": options},
    )
    (result,) = verify_model(demo_export, ["openvino"], options=chosen).results
    assert result.passed, result.error
    assert result.equal_tokens == result.tokens > 0


def test_it_computes_in_float32_unless_told(export: Export) -> None:
    expected = Reference(export, export.part("body")).run(feeds_of(export.part("body"), query=4))
    backend = load_backend("openvino")
    exact = run_body(export, CompileOptions())["last_hidden_state"]
    assert np.abs(exact - expected["last_hidden_state"]).max() < 1e-5
    assert backend.precision(CompileOptions()) is None
    half = CompileOptions(backend={"precision": "bfloat16"})
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        # This processor cannot: then it must say so, and not compute in another precision.
        with pytest.raises(BackendError, match="would compute in f32 on this CPU, not in bf16"):
            run_body(export, half)
        return
    rounded = run_body(export, half)["last_hidden_state"]
    assert 1e-4 < np.abs(rounded - expected["last_hidden_state"]).max() < 0.2
    assert backend.precision(half) == "bfloat16"


def test_a_precision_that_the_device_has_not_is_refused(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no precision 'int3'"):
        run_body(export, CompileOptions(backend={"precision": "int3"}))
    core = openvino.Core()
    asked = CompileOptions(backend={"precision": "float16"})
    if "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        # This processor can: then it must be what it did.
        assert run_body(export, asked)["last_hidden_state"].dtype == np.float32
        return
    with pytest.raises(BackendError, match="would compute in f32 on this CPU, not in f16"):
        run_body(export, asked)


def test_a_device_that_is_not_there_is_refused(export: Export) -> None:
    with pytest.raises(BackendError, match="finds no device 'NPU' here, only CPU"):
        run_body(export, CompileOptions(backend={"device": "npu"}))


def test_threads_are_as_many_as_were_asked_for(export: Export, tmp_path: Path) -> None:
    from qeff_proxy_npu.openvino.backend import OpenVinoBackend

    backend = OpenVinoBackend()
    for asked, given in ((1, 1), (10_000, len(os.sched_getaffinity(0)))):
        options = CompileOptions(num_cores=asked)
        compiled = backend._compile(export, export.part("body"), options, None, tmp_path)
        assert compiled.get_property("INFERENCE_NUM_THREADS") == given


def test_what_was_kept_is_used_and_done_without(export: Export) -> None:
    """A blob of another build is no error: the export is compiled anew."""
    options = CompileOptions(backend={"save_compiled": True})
    compiled = compile_export(export, "openvino", options)
    blob = compiled.folder / "body.blob"
    first = run_body(export, options)
    original = export.folder / "body.onnx"
    kept = original.read_bytes()
    original.write_bytes(b"")  # if it were read, opening would fail
    second = run_body(export, options)
    original.write_bytes(kept)
    blob.write_bytes(b"of another build".ljust(blob.stat().st_size, b"\0"))
    third = run_body(export, options)
    for found in (second, third):
        np.testing.assert_array_equal(found["last_hidden_state"], first["last_hidden_state"])
    assert not (compile_export(export, "openvino").folder / "body.blob").exists()


def test_a_refusal_names_operator_node_and_module(export: Export) -> None:
    unknown_operator(export, export.part("body"))
    with pytest.raises(
        BackendError,
        match=r"does not know the operator test.unknown.Nonsense "
        r"\(node node_nonsense in layers.3.mlp\)",
    ):
        run_body(export, CompileOptions())


def test_shapes_that_cannot_be_name_their_node(export: Export) -> None:
    path = export.folder / "body.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (scale,) = [one for one in model.graph.initializer if one.name == "scale"]
    scale.CopyFrom(onnx.numpy_helper.from_array(np.ones((3, 5, 7, 11), np.float32), "scale"))
    (wrong,) = [one for one in model.graph.node if one.output[0] == "attended"]
    wrong.input[1] = "scale"
    path.write_bytes(model.SerializeToString())
    assert sha256_of(path) != export.part("body").sha256
    with pytest.raises(BackendError, match=r"operator MatMul \(node node_attended in layers.0\)"):
        run_body(export, CompileOptions())
