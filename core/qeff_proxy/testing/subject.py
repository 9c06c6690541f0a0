"""The subject of the checks: one family's tiny model, with its cut, export, sessions and runs.

Each stage runs once, when a check first needs it.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, masking_utils
from transformers.utils import logging as transformers_logging

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.backends.compile_export import compile_export, open_sessions
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.cut.cut_model import Cut, cut_model
from qeff_proxy.export.export_model import export_model
from qeff_proxy.flows.causal_engine import Phase
from qeff_proxy.flows.flow import Job, load_flow
from qeff_proxy.layers.taps import normalize_taps, tap_proxy
from qeff_proxy.load.load_model import (
    LoadedModel,
    load_config,
    load_model,
    with_options,
    wrap_model,
)
from qeff_proxy.parts import Kind, Proxy
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.session.session import Session
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.testing.family import Family


@dataclass(frozen=True)
class Step:
    """One run of one part: its inputs and outputs by name."""

    phase: Phase
    index: int
    part: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]


class Run:
    """One run of the flow, and every run of a part in it."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.outputs: Mapping[str, Any] = {}

    def step(
        self,
        phase: Phase,
        index: int,
        part: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        *,
        past_length: int,  # noqa: ARG002 (a recorder's signature)
    ) -> None:
        """Keep a part's inputs and outputs (`qeff_proxy.flows.causal_engine.Recorder`)."""
        self.steps.append(Step(phase, index, part, dict(inputs), dict(outputs)))

    @property
    def results(self) -> dict[str, Any]:
        """The comparable results of the flow: arrays, and lists with one array per row."""
        return {name: value for name, value in self.outputs.items() if is_arrays(value)}

    @property
    def logits(self) -> list[Array]:
        """The logits that choose each token, of a pass's last position: ``[batch, vocabulary]``."""
        return [step.outputs["logits"][:, -1] for step in self.steps if "logits" in step.outputs]

    @property
    def tensors(self) -> dict[str, Array]:
        """Every tensor of every step."""
        return {
            f"{step.phase} {step.index} {step.part}.{name}": value
            for step in self.steps
            for name, value in step.outputs.items()
        }


class Subject:
    """A family's tiny model, with its cut, export, sessions and runs.

    Args:
        suite: The author's declarations.
        folder: An empty folder for files.
    """

    def __init__(self, suite: Family, folder: Path) -> None:
        self.suite = suite
        self.folder = folder
        self.state = global_state()
        self._open = ExitStack()

    def close(self) -> None:
        """Close the sessions."""
        self._open.close()

    @cached_property
    def plugins(self) -> Plugins:
        """The installed plugins, and the suite's ``plugin`` if it has one."""
        plugins = Plugins.discover()
        if self.suite.plugin is not None:
            plugins.register(self.suite.plugin, [self.suite.model_type])
        return plugins

    @cached_property
    def hooks(self) -> Hooks:
        """The hooks of the model type."""
        return self.plugins.hooks_for(self.suite.model_type, task=self.suite.task)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The uncut model, with eager attention."""
        _ = self.hooks  # imports the plugin, which may register the architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.suite.make_model().eval()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as `LoadedModel`."""
        return with_options(wrap_model(self.model), self.suite.options)

    @cached_property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The suite's inputs, each of one row; the same in every run, in any order of tests."""
        model = self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [dict(row) for row in self.suite.make_inputs(model)]

    @cached_property
    def processor(self) -> Any:
        """The suite's processor, or ``None``."""
        return self.suite.make_processor()

    @cached_property
    def cut(self) -> Cut:
        """The split, verified."""
        return self.cut_as("split")

    @cached_property
    def proxy(self) -> Proxy:
        """The split without verification, for checks that do not depend on its numbers."""
        return self.cut_as("split", verify=False).proxy

    def cut_as(self, kind: Kind, *, verify: bool = True) -> Cut:
        """The model, cut."""
        return cut_model(self.loaded, self.hooks, kind, verify=verify)

    @cached_property
    def checkpoint(self) -> Path:
        """A folder with the model."""
        self.model.save_pretrained(self.folder / "checkpoint")
        return self.folder / "checkpoint"

    @property
    def stored(self) -> LoadedModel:
        """The model in its folder; nothing of it is read."""
        return with_options(load_model(str(self.checkpoint)), self.suite.options)

    @cached_property
    def export(self) -> Export:
        """The split on disk, with layer taps: streamed from the checkpoint's folder."""
        output = self.folder / "export"
        return export_model(self.stored, self.hooks, "split", output=output, taps=self.suite.taps)

    @cached_property
    def sessions(self) -> dict[str, Session]:
        """A session of ONNX Runtime per part."""
        return self._open.enter_context(open_sessions(compile_export(self.export)))

    @cached_property
    def torch_sessions(self) -> dict[str, Session]:
        """A session of PyTorch per part, on the parts of `cut` with the export's layer taps."""
        proxy = tap_proxy(self.cut.proxy, normalize_taps(self.suite.taps))
        return {part.name: TorchSession(part) for part in proxy.parts}

    @cached_property
    def run(self) -> Run:
        """A run of the first of the suite's inputs on ONNX Runtime."""
        return self.run_on(self.rows[0])

    def run_on(
        self,
        inputs: Mapping[str, Any] | None,
        *,
        request: Request | None = None,
        sessions: Mapping[str, Session] | None = None,
        options: CompileOptions | None = None,
        kind: Kind = "split",
        proxy: Proxy | None = None,
    ) -> Run:
        """Run the flow.

        Args:
            inputs: Tensors by name.
            request: A user's request instead of inputs.
            sessions: By default those of ONNX Runtime.
            options: The compile options that the flow gets.
            kind: The export's kind that the flow gets.
            proxy: Run these parts in PyTorch instead.
        """
        export = replace(self.export, kind=kind)
        if proxy is not None:
            export = replace(export, parts=proxy.parts, settings=proxy.settings)  # type: ignore[arg-type]
            sessions = {part.name: TorchSession(part) for part in proxy.parts}
        request = request or Request(inputs=inputs)
        run = Run()
        job = Job(
            export=export,
            sessions=self.sessions if sessions is None else sessions,
            options=options or CompileOptions(batch_size=2),
            config=load_config(self.export.processor_folder),
            tensors=self.hooks.preprocess(processor=self.processor, request=request),
            folder=self.export.processor_folder,
            settings=dict(self.suite.settings),
            processor=self.processor,
            recorder=run,
        )
        run.outputs = load_flow(self.export.flow).run(job)
        return run

    def results_of_row(self, run: Run, row: int, rows: int) -> dict[str, Any]:
        """The results of a run for one of its rows."""
        results: dict[str, Any] = {}
        for name, value in run.results.items():
            if len(value) == rows:
                results[name] = value[row]
        if self.suite.capabilities.cache:
            results["logits of each step"] = [logits[row] for logits in run.logits]
        return results

    def half_copy(self) -> LoadedModel:
        """The model in float16."""
        model = copy.deepcopy(self.model).to(torch.float16)
        return with_options(wrap_model(model), self.suite.options)


def is_arrays(value: Any) -> bool:
    """Whether a flow's output can be compared: an array, or a list with one array per row."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, np.ndarray) for one in value)
    )


def global_state() -> dict[str, Any]:
    """The global state that a plugin must not change, by name."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    creators = {name: id(value) for name, value in vars(masking_utils).items() if callable(value)}
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 (whether it moved)
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        # Models draw random numbers, too (layer dropout), so only compare the seed.
        "torch's random seed": torch.initial_seed(),
        "NumPy's random numbers": (numpy_state[1].tolist(), numpy_state[2]),
        "Python's random numbers": random.getstate(),
        "the environment's variables": environ,
        "the working folder": os.getcwd(),  # noqa: PTH109 (the string, to compare)
        "the mask functions of transformers": creators,
        "transformers' log level": transformers_logging.get_verbosity(),
    }
