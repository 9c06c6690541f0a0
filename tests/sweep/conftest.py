"""A package with a backend that can have a fault in one layer, and an executor of short cells."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BACKEND = """
import os
from dataclasses import replace
import numpy as np
import onnx_ir as ir
from qeff_proxy.artifact.hashes import sha256_of
from qeff_proxy.backends.onnxruntime.backend import OnnxRuntimeBackend
from qeff_proxy.graph.name_scopes import NAME_SCOPES

LAYER = None

def put_fault(graph):
    named = f"layers.{LAYER}.mlp.down_proj"
    node = next((n for n in graph if n.op_type == "MatMul"
                 and named in n.metadata_props.get(NAME_SCOPES, "")), None)
    if node is None:  # another layer alone
        return
    factor = ir.Value(name="fault", const_value=ir.tensor(np.float32(1.05), name="fault"))
    graph.register_initializer(factor)
    output = node.outputs[0]
    new = ir.Node("", "Mul", [output, factor], num_outputs=1)
    new.outputs[0].name, new.outputs[0].dtype = "faulty", output.dtype
    graph.insert_after(node, new)
    for user, index in list(output.uses()):
        if user is not new:
            user.replace_input_with(index, new.outputs[0])

class Toy(OnnxRuntimeBackend):
    options = {}
    values = {}

    def versions(self):
        return {"toy-sdk": "2" if LAYER else "1"}

    def compile(self, export, part, options, folder):
        pass

    def open(self, export, part, options, folder):
        return self.open_once(export, part, options, folder)

    def open_once(self, export, part, options, folder):
        if part.name != "body" or LAYER is None:
            return super().open_once(export, part, options, folder)
        model = ir.load(export.folder / part.file)
        put_fault(model.graph)
        path = export.folder / f"{part.file}.{os.getpid()}.onnx"
        ir.save(model, path)
        part = replace(part, file=path.name, sha256=sha256_of(path))
        try:
            return super().open_once(export, part, options, folder)
        finally:
            path.unlink()
"""

EXECUTOR = '''
"""Cells that load nothing: what they do is in the name of their model."""
import os
import signal
import subprocess
import time
import msgspec
from qeff_proxy.sweep.local_executor import LocalExecutor

def short(job):
    model = job.cell.model
    if model.startswith("hangs"):
        subprocess.Popen(["sleep", "321"])
        time.sleep(60)
    if model.startswith("dies"):
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if model.startswith("grows"):
        kept = bytearray(os.urandom(1 << 20) * 300)
        time.sleep(60)
    if model.startswith("raises"):
        raise RuntimeError("a defect of the worker")
    time.sleep(0.4 if model.startswith("slow") else 0.03)
    with open(job.folder / "ran.txt", "a") as file:
        file.write(f"{job.cell.name}\\n")
    return job.record("passed", error=1e-6, seconds={"total": 0.03}), {"x": ["h", 1, 2]}

class Quick(LocalExecutor):
    preload = ("qeff_proxy.sweep.local_executor",)

    def submit(self, job):
        return super().submit(msgspec.structs.replace(job, work="quick_executor:short"))
'''


@pytest.fixture(scope="module")  # no longer: other tests list what is installed
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the package, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_backend.py").write_text(BACKEND, encoding="utf-8")
    (folder / "quick_executor.py").write_text(EXECUTOR, encoding="utf-8")
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[qeff_proxy.backends]\ntoy = toy_backend:Toy\n"
        "[qeff_proxy.executors]\nquick = quick_executor:Quick\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))
        yield folder


@pytest.fixture
def write_plan(tmp_path: Path, toys: Path) -> Callable[..., Path]:
    """Writes a plan; by default of cells that load nothing."""

    def write(text: str = "", cells: int = 0, name: str = "plan.toml") -> Path:
        text = textwrap.dedent(text)
        models = "".join(f'"m{number:02}" = "./none-{number}"\n' for number in range(cells))
        if cells:
            text += f"[models]\n{models}[backends.nonesuch]\n"
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
