"""Our own backends, held to the suite that other packages' backends are held to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.backends import BackendSuite
from qeff_proxy.testing.tiny import random_weights, tiny_config
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from qeff_proxy.artifact.manifest_schema import Export


class TestOnnxRuntime(BackendSuite):
    backend = "onnxruntime"


class TestOnnxRuntimeWithoutItsRewriting(BackendSuite):
    """The cache goes in and comes out, and the prepared graph is kept."""

    backend = "onnxruntime"
    options = {"in_place": False, "save_optimized": False}  # noqa: RUF012 (as the suite has it)


class TestOnnxRuntimeOfQuantizedWeights(BackendSuite):
    backend = "onnxruntime"
    options = {"weights": "int8", "block_size": 16}  # noqa: RUF012 (as the suite has it)
    tolerances = {"float32": 0.05, "float16": 0.05}  # noqa: RUF012 (as the suite has it)


class TestTorch(BackendSuite):
    """PyTorch runs the model's code and no graph, so it is tried on a real model."""

    backend = "torch"
    dtypes = ("float32",)
    reads_graphs = False

    def make_export(self, folder: Path, dtype: str) -> Export:
        return export_model(
            wrap_model(random_weights(AutoModelForCausalLM.from_config(tiny_config("gpt2")))),
            Plugins.discover().hooks_for("gpt2"),
            output=folder,
        )
