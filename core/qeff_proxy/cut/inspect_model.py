"""Inspect: what a cut would take out of a model, and what would stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qeff_proxy.cut.cut_model import cut_model, site_weights
from qeff_proxy.cut.locate_sites import site_to_json
from qeff_proxy.flows.flow import CutReport
from qeff_proxy.layers.layer_lists import describe_kinds, find_layer_list
from qeff_proxy.load.first_layers import enough_layers
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.transformers_model import NotSampled
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.sites import Absent, Site


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
        layers: One entry per kind of layer: its class, which layers they are, what they say of
            themselves and their parameters; empty where no list of layers is found.
        verified_layers: How many layers were loaded and run; ``None`` where all were.
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
    layers: list[dict[str, Any]]
    verified_layers: int | None
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
    model, short, verified = _model_and_sample(loaded)
    cut = cut_model(short, hooks, "split")
    layers = find_layer_list(model)
    weights = {name: site_weights(short, site) for name, site in cut.sites.items()}
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
        layers=describe_kinds(layers) if layers is not None else [],
        verified_layers=verified,
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


def _model_and_sample(loaded: LoadedModel) -> tuple[nn.Module, LoadedModel, int | None]:
    """The model; and what to run of it: its first layers, and how many, or all of it."""
    if loaded.sample is not None and not loaded.is_read:
        try:
            sampled = loaded.sample(enough_layers)
            sampled.check_alike()
            short = sampled.short()
        except NotSampled:
            return loaded.model, loaded, None
        return sampled.model, replace(loaded, read=lambda: short), sampled.count
    return loaded.model, loaded, None


def _storages(model: nn.Module, names: set[str] | None) -> dict[int, tuple[int, int]]:
    """Identity of the data → elements and bytes, each piece of memory once."""
    return {
        id(parameter) if parameter.is_meta else parameter.data_ptr(): (
            parameter.numel(),
            parameter.numel() * parameter.element_size(),
        )
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names is None or name in names
    }
