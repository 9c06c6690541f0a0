"""Threads that export at once do not see each other, and other threads do not see them."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import wrap_model
from qeff_proxy.plugins.manager import Plugins
from torch._dynamo import config as dynamo_config
from torch.onnx._internal.exporter import _core
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TYPES = ("gpt2", "llama")
LOGGERS = ("", "torch", "torch.onnx", "transformers", "onnxscript", "onnx_ir")


def export(
    model: PreTrainedModel, folder: Path, progress: Callable[[str], None] = lambda _stage: None
) -> dict[str, bytes]:
    """The files of an export of a model, by name."""
    hooks = Plugins.discover().hooks_for(model.config.model_type)
    found = export_model(wrap_model(model), hooks, output=folder, progress=progress)
    return {
        path.name: path.read_bytes()
        for pattern in ("*.onnx", "*.safetensors")
        for path in found.folder.glob(pattern)
    }


def process_state() -> dict[str, Any]:
    """Whatever an export might leave changed in the process."""
    loggers = {name: logging.getLogger(name) for name in LOGGERS}
    return {
        "levels": {name: logger.level for name, logger in loggers.items()},
        "handlers": {
            name: [(handler, list(handler.filters)) for handler in logger.handlers]
            for name, logger in loggers.items()
        },
        "streams": (sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "collector": gc.get_threshold(),
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "loader": dict(vars(PreTrainedModel)),
        "masks": [
            {name: value for name, value in vars(module).items() if name.startswith("create_")}
            for module in (modeling_gpt2, modeling_llama)
        ],
        "exporter": (
            torch.onnx.export,
            _core._prepare_exported_program_for_export,
            ONNXRegistry.__dict__["from_torchlib"],
        ),
        "notes": (
            torch.fx.config.do_not_emit_stack_traces,
            dynamo_config.fake_tensor_cache_enabled,
        ),
        "operators": (torch.where, torch.split, torch.nn.Module.__call__),
        "dtype": torch.get_default_dtype(),
    }


@pytest.fixture(scope="module")
def models(make_model: Any) -> dict[str, PreTrainedModel]:
    return {model_type: make_model(model_type) for model_type in TYPES}


@pytest.fixture(scope="module")
def alone(
    models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The files of each model's export, made one after another."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: export(model, folder / name) for name, model in models.items()}


@pytest.fixture
def bystanders(models: dict[str, PreTrainedModel], make_model: Any) -> Iterator[list[str]]:
    """Runs models of the same types in a thread of its own; yields what went wrong."""
    over = threading.Event()
    runs: list[str] = []
    wrong: list[str] = []
    tokens = torch.arange(12).reshape(2, 6)

    def run() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while not over.wait(0.05):
                for name, model in own.items():
                    try:
                        logits = model(tokens).logits
                    except Exception as error:  # noqa: BLE001 (whatever a patch may do)
                        wrong.append(f"{name}: {type(error).__name__}: {error}")
                        continue
                    runs.append(name)
                    if not torch.equal(logits, expected[name]):
                        wrong.append(f"{name}: {(logits - expected[name]).abs().max()}")

    own = {name: make_model(name) for name in models}
    with torch.no_grad():
        expected = {name: model(tokens).logits for name, model in own.items()}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            yield wrong
        finally:
            over.set()
    running.result()
    assert set(runs) == set(TYPES)
    assert wrong == []


@pytest.mark.usefixtures("bystanders")
@pytest.mark.parametrize("last", ["first", "second"])
def test_exports_at_once_are_those_made_alone(
    models: dict[str, PreTrainedModel],
    alone: dict[str, dict[str, bytes]],
    tmp_path: Path,
    last: str,
) -> None:
    before = process_state()
    begun = {name: threading.Event() for name in ("first", "second")}
    ended = {name: threading.Event() for name in ("first", "second")}
    other = {"first": "second", "second": "first"}

    def run(name: str, model_type: str) -> dict[str, bytes]:
        def progress(now: str) -> None:
            if now == "tracing body":
                begun[name].set()
                assert begun[other[name]].wait(120)
                assert name != last or ended[other[name]].wait(120)

        try:
            return export(models[model_type], tmp_path / name, progress)
        finally:
            begun[name].set()
            ended[name].set()

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, name, kind) for name, kind in zip(begun, TYPES, strict=True)]
        results = [job.result() for job in jobs]
    assert results == [alone[kind] for kind in TYPES]
    assert process_state() == before
