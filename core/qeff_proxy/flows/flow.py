"""Flows: run the parts of a proxy, and verify that a cut equals the uncut model.

The core ships ``causal-lm``. A package registers others as entry points of the group
``qeff_proxy.flows``: the name a `Proxy` carries → a class without constructor arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.parts import Proxy
from qeff_proxy.plugins.entry_points import find_entry, load_entry
from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.artifact.manifest_schema import Export
    from qeff_proxy.flows.causal_engine import Recorder
    from qeff_proxy.session.session import Session

ENTRY_POINT_GROUP = "qeff_proxy.flows"
BUILTIN_FLOWS = {"causal-lm": "qeff_proxy.flows.causal_lm:CausalFlow"}


@dataclass(frozen=True)
class CutReport:
    """The result of verifying a cut.

    Attributes:
        max_difference: Largest absolute difference of an output element.
        largest_value: Largest absolute output element of the uncut model.
        tolerance: The bound on the ratio of the two.
        dtype: The dtype of the parts and of the model.
        positions: The number of compared positions.
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
        export: The export.
        sessions: One per part, by name.
        options: The compile options.
        config: Of the uncut model.
        tensors: The inputs, from the ``preprocess`` hook, by name.
        settings: The user's other settings: ``max_new_tokens``, ``num_beams`` …
        processor: The tokenizer or processor; ``None`` where there is none.
        recorder: Sees every run of every part; ``None`` without a dump.
        folder: The folder of the checkpoint's small files (``generation_config.json``).
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
    """Verifies and runs one kind of proxy."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the parts with the uncut model, on random inputs, in the model's dtype.

        Raises:
            CutError: They differ; names the sites and the worst element.
        """

    def run(self, job: Job) -> Mapping[str, Any]:
        """Run the parts.

        Returns:
            The outputs for the ``decode`` hook; for ``causal-lm`` the key ``generated_ids``.
        """


@runtime_checkable
class ExampleFlow(Flow, Protocol):
    """A flow whose models take inputs other than text, and which makes an example of them.

    Optional: `qeff_proxy.run.example_request` uses it where a flow has it.
    """

    def example_request(
        self, export: Export, processor: Any, proxy: Callable[[], Proxy]
    ) -> Request:
        """Make an input for a run without one from the user; always the same.

        Args:
            export: Of the model.
            processor: Its tokenizer or processor; ``None`` where it has none.
            proxy: Makes its parts, live.
        """


@runtime_checkable
class CheckedFlow(Flow, Protocol):
    """A flow that can tell whether a processor fits the parts, before anything is exported."""

    def check_processor(
        self, proxy: Proxy, processor: Any, preprocess: Callable[[Request], Any]
    ) -> None:
        """Refuse a processor that does not fit.

        Args:
            proxy: The parts.
            processor: The checkpoint's.
            preprocess: Makes a request's tensors.

        Raises:
            CheckpointError: Says where they disagree.
        """


@runtime_checkable
class TimedFlow(Flow, Protocol):
    """A flow that measures its work, and runs the uncut model on the same input, to compare speed.

    Optional for flows that output ``generated_ids``: their tokens are counted, and the uncut
    model's own ``generate`` runs on the same tensors and settings.
    """

    def amount(self, job: Job) -> tuple[float, str]:
        """The amount of work in one run, and its unit in the plural: ``(32.0, "texts")``."""

    def run_model(self, model: PreTrainedModel, job: Job) -> object:
        """Run the uncut model on the job's tensors, as its users would; the result is not used.

        Called without gradients.
        """


def load_flow(name: str) -> Flow:
    """Make the flow called ``name``.

    Raises:
        PluginError: No package has a flow of that name, several have, or it cannot be imported.
    """
    entry = find_entry(ENTRY_POINT_GROUP, "flow", name, BUILTIN_FLOWS)
    return load_entry(entry, "flow", lambda flow_class: cast("Flow", flow_class()))
