"""Inspect: what a cut would take out of a model, and what would stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qeff_proxy.cut import cut_model, site_weights
from qeff_proxy.locate import site_to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from qeff_proxy.flows import CutReport
    from qeff_proxy.load import LoadedModel
    from qeff_proxy.plugin_hooks import Hooks
    from qeff_proxy.sites import Absent, Site

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        source: What the user named the model by.
        model_type: Of its config.
        architecture: Its class.
        plugin: Who answered the hooks.
        dtype: Of its weights.
        sites: What was located.
        tied: Whether embedding and LM head share their weights.
        parameters: Number of distinct parameters.
        body_bytes: Bytes of the weights that stay in the body.
        vocabulary_bytes: Bytes of the weights that are cut out, tied ones once.
        parts: Part → what it takes and gives, by name.
        report: What was verified of the cut.
    """

    source: str
    model_type: str
    architecture: str
    plugin: str
    dtype: str
    sites: Mapping[str, Site | Absent]
    tied: bool
    parameters: int
    body_bytes: int
    vocabulary_bytes: int
    parts: Mapping[str, Mapping[str, list[str]]]
    report: CutReport | None

    def to_json(self) -> dict[str, Any]:
        """The inspection as a JSON object."""
        return {
            **vars(self),
            "sites": {name: site_to_json(site) for name, site in self.sites.items()},
            "parts": {name: dict(tensors) for name, tensors in self.parts.items()},
            "report": self.report.to_json() if self.report else None,
        }


def inspect_model(loaded: LoadedModel, hooks: Hooks) -> Inspection:
    """Locate the sites of a model, cut it, verify the cut, and write nothing.

    Raises:
        UnsupportedModelError: No plugin knows how to cut it.
        CutError: The parts do not equal the model.
    """
    model = loaded.model
    cut = cut_model(loaded, hooks, "split")
    weights = {name: site_weights(loaded, site) for name, site in cut.sites.items()}
    vocabulary = set().union(*weights.values())
    tables = _storages(model, vocabulary)
    everything = _storages(model, None)
    return Inspection(
        source=loaded.source,
        model_type=loaded.model_type,
        architecture=type(model).__name__,
        plugin=hooks.plugin,
        dtype=loaded.dtype,
        sites=cut.sites,
        tied=bool(
            set(_storages(model, weights["embedding"])) & set(_storages(model, weights["lm_head"]))
        ),
        parameters=sum(count for count, _ in everything.values()),
        body_bytes=sum(size for key, (_, size) in everything.items() if key not in tables),
        vocabulary_bytes=sum(size for _, size in tables.values()),
        parts={
            part.name: {
                # The trace drops what turns out to be useless of the rest.
                "takes": [part.inputs[0].name],
                "gives": [spec.name for spec in part.outputs],
            }
            for part in cut.proxy.parts
        },
        report=cut.report,
    )


def _storages(model: nn.Module, names: set[str] | None) -> dict[int, tuple[int, int]]:
    """Address of the data → elements and bytes, each piece of memory once."""
    return {
        parameter.data_ptr(): (parameter.numel(), parameter.numel() * parameter.element_size())
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names is None or name in names
    }
