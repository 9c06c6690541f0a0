"""Flows: how the parts of a proxy are run, and how a cut of that kind is verified.

The core ships ``causal-lm``. A package registers others as entry points of the group
``qeff_proxy.flows``: the name a `Proxy` carries → a class without constructor arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from qeff_proxy.plugins.entry_points import find_entry, load_entry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.artifact.export_folder import Export
    from qeff_proxy.compile_options import CompileOptions
    from qeff_proxy.flows.causal_engine import Recorder
    from qeff_proxy.parts import Proxy
    from qeff_proxy.request import Request
    from qeff_proxy.session.session import Session
    from qeff_proxy.sites import Absent, Site

__all__ = [
    "BUILTIN_FLOWS",
    "ENTRY_POINT_GROUP",
    "CutReport",
    "ExampleFlow",
    "Flow",
    "Job",
    "TimedFlow",
    "load_flow",
]

ENTRY_POINT_GROUP = "qeff_proxy.flows"
BUILTIN_FLOWS = {"causal-lm": "qeff_proxy.flows.causal_lm:CausalFlow"}


@dataclass(frozen=True)
class CutReport:
    """What was verified of a cut.

    Attributes:
        max_difference: Largest absolute difference of an output element.
        largest_value: Largest absolute output element of the uncut model.
        tolerance: The bound on the ratio of the two.
        dtype: The dtype both ran in.
        positions: How many positions were compared.
    """

    max_difference: float
    largest_value: float
    tolerance: float
    dtype: str
    positions: int

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return dict(vars(self))


@dataclass(frozen=True)
class Job:
    """One run of a compiled proxy.

    Attributes:
        export: What was exported.
        sessions: One per part, by name.
        options: What it was compiled with.
        config: Of the uncut model.
        tensors: What ``preprocess`` made of the request, by name.
        settings: What the user asked for besides: ``max_new_tokens``, ``num_beams`` …
        processor: The tokenizer or processor; ``None`` where there is none.
        recorder: Sees every run of every part; ``None`` without a dump.
        folder: Where the checkpoint's small files lie (``generation_config.json``).
    """

    export: Export
    sessions: Mapping[str, Session]
    options: CompileOptions
    config: PreTrainedConfig
    tensors: Mapping[str, torch.Tensor]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = None
    recorder: Recorder | None = None


class Flow(Protocol):
    """How one kind of proxy is verified and run."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Hold the parts against the uncut model, on random inputs, in the model's own dtype.

        Raises:
            CutError: They are not equal; names the sites and the worst element.
        """

    def run(self, job: Job) -> Mapping[str, Any]:
        """Run the parts.

        Returns:
            What the ``decode`` hook gets; for ``causal-lm`` the key ``generated_ids``.
        """


@runtime_checkable
class ExampleFlow(Flow, Protocol):
    """A flow whose models take something else than text: it gives an example of that.

    A flow need not be one. `qeff_proxy.run.example_request` asks those that are.
    """

    def example_request(
        self, export: Export, processor: Any, proxy: Callable[[], Proxy]
    ) -> Request:
        """Something that the model can be run on where a user gave nothing, the same each time.

        Args:
            export: Of the model.
            processor: Its tokenizer or processor; ``None`` where it has none.
            proxy: Makes its parts, live.
        """


@runtime_checkable
class TimedFlow(Flow, Protocol):
    """A flow that says how much it does, and does the same with the uncut model, for its speed.

    A flow whose runs give ``generated_ids`` need not be one: their tokens are counted, and the
    uncut model's own ``generate`` is given the same tensors and settings.
    """

    def amount(self, job: Job) -> tuple[float, str]:
        """How much one run does, and of what, in the plural: ``(32.0, "texts")``."""

    def run_model(self, model: PreTrainedModel, job: Job) -> object:
        """Run the uncut model on the job's tensors, as its users would; what it gives is not used.

        Called without gradients.
        """


def load_flow(name: str) -> Flow:
    """Make the flow called ``name``.

    Raises:
        PluginError: No package has a flow of that name, several have, or it cannot be imported.
    """
    target = BUILTIN_FLOWS.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        return cast("Flow", getattr(importlib.import_module(module), attribute)())
    entry = find_entry(ENTRY_POINT_GROUP, "flow", name, BUILTIN_FLOWS)
    return load_entry(entry, "flow", lambda flow_class: cast("Flow", flow_class()))
