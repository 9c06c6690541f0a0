"""A backend that ends its process, or fails, does not end ``isolate``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from operator_faults import REQUEST
from qeff_proxy.cli import main
from qeff_proxy.errors import BackendError
from qeff_proxy.isolate import describe_fault, isolate_fault
from qeff_proxy.session.messages import read_message, write_message
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

BACKEND = """
import os
import signal
from pathlib import Path

import onnx
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend


class Acme(OnnxRuntimeBackend):
    def open_once(self, export, part, options, folder):
        graph = onnx.load(export.folder / part.file, load_external_data=False).graph
        print("noise on standard output")
        if any(WHERE for node in graph.node):
            HOW
        return super().open_once(export, part, options, folder)
"""
WAYS = {
    "SIGSEGV": "os.kill(os.getpid(), signal.SIGSEGV)",
    "status 3": "os._exit(3)",
    "Softmax is not supported": "raise RuntimeError('Softmax is not supported')",
}


IN_LAYER_3 = 'node.op_type == "Softmax" and node.name.endswith("layer_3")'


def install(site_packages: Any, how: str, where: str = IN_LAYER_3) -> None:
    entry = b"[qeff_proxy.backends]\nacme = acme_backend:Acme\n"
    site_packages.install_metadata("acme", entry)
    module = site_packages.folder / "acme_backend.py"
    module.write_text(BACKEND.replace("HOW", how).replace("WHERE", where), encoding="utf-8")


OPTIONS = VerifyOptions(max_new_tokens=1)


def isolate(checkpoint: Path, **more: Any) -> Any:
    return isolate_fault(str(checkpoint), "acme", REQUEST, OPTIONS, **more)


@pytest.mark.parametrize("why", WAYS)
def test_the_operator_is_named_that_a_backend_dies_on(why, checkpoint, site_packages):
    install(site_packages, WAYS[why])
    fault = isolate(checkpoint)
    said = "\n".join(describe_fault(fault))
    assert fault.where == "body layer 3", said
    (cause,) = fault.causes
    assert [operator.operator for operator in cause.operators] == ["Softmax"]
    assert f"The backend refuses this: {cause.refused}" in said
    assert why in str(cause.refused)


@pytest.mark.parametrize("why", WAYS)
@pytest.mark.parametrize("layer", [None, "3"])
def test_a_backend_that_runs_nothing_is_no_operators_fault(why, layer, checkpoint, site_packages):
    install(site_packages, WAYS[why], where="True")
    with pytest.raises(BackendError, match="even one addition") as raised:
        isolate(checkpoint, layer=layer)
    assert why in str(raised.value)


def test_a_layer_that_is_not_reached_is_not_called_missing(checkpoint, site_packages):
    install(site_packages, WAYS["status 3"], where='"Softmax" in node.op_type')
    with pytest.raises(BackendError, match=r"did not get as far as 5: body layer 0: .*status 3"):
        isolate(checkpoint, layer="5")


def test_an_option_that_the_backend_has_not_is_refused_at_once(checkpoint, site_packages, capsys):
    install(site_packages, "pass")
    assert main(["isolate", str(checkpoint), "--backend", "acme", "-O", "acme.speed=9"]) == 2
    assert "has no option 'speed'" in capsys.readouterr().err


def test_a_healthy_one_computes_there_what_it_does_here(checkpoint, site_packages, tmp_path):
    install(site_packages, "pass")
    fault = isolate(checkpoint, layer="3")
    assert fault.local.passed
    assert (
        fault.local
        == isolate_fault(str(checkpoint), "onnxruntime", REQUEST, OPTIONS, layer="3").local
    )


def test_no_process_stays_behind(checkpoint, site_packages):
    install(site_packages, WAYS["SIGSEGV"])
    isolate(checkpoint)
    said = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True)
    ours = [line for line in said.stdout.splitlines() if "own_process" in line]
    assert not [line for line in ours if line.split()[0] == str(os.getpid())]


def test_the_core_ends_its_own_process_alone(checkpoint, site_packages):
    """The process imports a module that lets ONNX Runtime's backend crash in one operator."""
    crash = BACKEND.replace("HOW", WAYS["SIGSEGV"]).replace("WHERE", IN_LAYER_3)
    crash += "\n\nOnnxRuntimeBackend.open_once = Acme.open_once\n"
    crash = crash.replace("super().open_once(", "original(self, ")
    crash = crash.replace("class Acme", "original = OnnxRuntimeBackend.open_once\n\n\nclass Acme")
    (site_packages.folder / "sitecustomize.py").write_text(crash, encoding="utf-8")
    fault = isolate_fault(str(checkpoint), "onnxruntime", REQUEST, OPTIONS)
    assert fault.where == "body layer 3"
    (cause,) = fault.causes
    assert [operator.operator for operator in cause.operators] == ["Softmax"]
    assert cause.refused == "onnxruntime ended its process (SIGSEGV)"


def test_arrays_of_every_dtype_pass(tmp_path):
    arrays = {
        "bfloat16": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "float16": np.array(0.5, np.float16),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.int64),
        "transposed": np.arange(6.0).reshape(2, 3).T,
    }
    with (tmp_path / "pipe").open("wb") as stream:
        write_message(stream, {"do": "run"}, arrays)
    with (tmp_path / "pipe").open("rb") as stream:
        header, found = read_message(stream)
        assert header == {"do": "run"}
        with pytest.raises(EOFError):
            read_message(stream)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_the_process_ends_when_the_pipe_does():
    command = [sys.executable, "-m", "qeff_proxy.backends.own_process"]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
