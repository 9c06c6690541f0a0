"""Cut a model and trace its parts.

Of a checkpoint only the first layers are loaded (`qeff_proxy.load.first_layers`). The plugin cuts a
model of these layers, which is verified and traced, and the whole model, which tells what the
missing layers are connected to; the graph is then expanded to all layers. ONNX Runtime runs the
same graph with the first layers only. Models that this does not work for are loaded and run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qeff_proxy.cut.cut_model import Cut, cut_model, site_weights
from qeff_proxy.errors import (
    CheckpointError,
    CutError,
    ExportError,
    PluginError,
    ProxyError,
    UnsupportedModelError,
)
from qeff_proxy.export.repeat.mark_layers import NotRepeatable, marked_layers
from qeff_proxy.export.trace.trace_part import TracedPart, trace_part, trace_sample
from qeff_proxy.layers.layer_lists import LayerList, describe_kinds, find_layer_list
from qeff_proxy.layers.taps import tap_proxy
from qeff_proxy.load.first_layers import SampledModel, at_most
from qeff_proxy.load.load_model import LoadedModel
from qeff_proxy.load.mapped_memory import few_pages
from qeff_proxy.load.transformers_model import NotSampled
from qeff_proxy.load.weight_sources import WeightSources
from qeff_proxy.parts import Kind, Part, TensorSpec
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.tensor_names import LAYER_NAME


@dataclass(frozen=True)
class GraphJob:
    """What to make graphs of, and how.

    Attributes:
        loaded: The model.
        hooks: Of its model type.
        kind: How to cut it.
        opset: As in `qeff_proxy.export.trace.trace_part`.
        taps: Extra outputs of each layer.
        progress: Called with the name of each stage as it starts.
    """

    loaded: LoadedModel
    hooks: Hooks
    kind: Kind
    opset: int | None
    taps: Sequence[str]
    progress: Callable[[str], None]


@dataclass
class Graphs:
    """The graphs of a model, not yet written.

    Attributes:
        model: The model; weights of layers that were not loaded are on the meta device.
        cut: How it, or its first layers, were cut and verified.
        traced: One graph per part, of all layers.
        checks: One graph per part to compare with the cut's part; ``None`` for the one in
            ``traced``.
        layers: Part → number of layers that were traced, where others were cloned from them.
        sources: Where the weights come from; empty where they are in memory.
        report: What ``export.json`` says about layers and weights.
    """

    model: Any
    cut: Cut
    traced: list[TracedPart]
    checks: list[TracedPart | None]
    layers: dict[str, int] = field(default_factory=dict)
    sources: WeightSources = field(default_factory=WeightSources)
    report: dict[str, Any] = field(default_factory=dict)

    def add(self, traced: TracedPart, check: TracedPart | None = None) -> None:
        """Add the graph of the next part, and the one to check instead of it."""
        self.traced.append(traced)
        self.checks.append(check)
        if traced.layers:
            self.layers[traced.name] = traced.layers
        if traced.reason is not None:
            self.report.setdefault("traced_whole", {})[traced.name] = traced.reason

    def report_layers(self, layers: LayerList, *, verified: int) -> None:
        """Say how many layers there are, of which kinds, and how many of them were verified."""
        self.report["layers"] = {
            "count": len(layers.layers),
            "verified": verified,
            "kinds": describe_kinds(layers),
        }


def graphs_of_sample(
    job: GraphJob,
    *,
    choose: Callable[[LayerList], int],
    repeat: bool = True,
) -> Graphs:
    """The graphs of a checkpoint, of which only the first layers are loaded.

    Args:
        job: What to export.
        choose: How many layers to load: `enough_layers` or `all_layers`.
        repeat: As in `graphs_of_whole`; only a model with all layers can do without.

    Raises:
        NotSampled: Its first layers are not enough; says why.
        CutError: The parts do not equal the model; or as `qeff_proxy.export.export_model`.
    """
    if job.loaded.sample is None or job.loaded.is_read:
        raise NotSampled("it is in memory")
    short, sampled, cut = _cut_sample(job, choose)
    names = _tensor_names(sampled.model)
    graphs = Graphs(sampled.model, cut, [], [], sources=sampled.sources)
    in_layers = {id(p) for layer in sampled.layers.layers for p in layer.parameters()}
    deep = _full_depth(job, sampled, cut)
    for part, deep_part in zip(cut.proxy.parts, deep, strict=True):
        job.progress(f"tracing {part.name}")
        if part is deep_part or not any(id(p) in in_layers for p in part.module.parameters()):
            graphs.add(trace_part(part, names, job.opset, repeat=repeat))
        else:
            graphs.add(*_traced_sample(part, deep_part, sampled, names, job.opset))
    graphs.report_layers(sampled.layers, verified=sampled.count)
    _check_separate(short, graphs)
    return graphs


def graphs_of_whole(
    job: GraphJob,
    *,
    repeat: bool,
) -> Graphs:
    """The graphs of a model that is wholly in memory.

    Args:
        job: What to export.
        repeat: Trace one layer of each kind and clone it, where that is cheaper.
    """
    cut = _cut(job)
    model = job.loaded.model
    names = _tensor_names(model)
    graphs = Graphs(model, cut, [], [])
    for part in cut.proxy.parts:
        job.progress(f"tracing {part.name}")
        graphs.add(trace_part(part, names, job.opset, repeat=repeat))
    layers = find_layer_list(model)
    if layers is not None:
        graphs.report_layers(layers, verified=len(layers.layers))
    _check_separate(job.loaded, graphs)
    return graphs


def _tensor_names(model: Any) -> dict[int, str]:
    """The names of a model's buffers and parameters, by `id`."""
    tensors = [*model.named_buffers(), *model.named_parameters()]
    return {id(tensor): name for name, tensor in tensors}


def _cut_sample(
    job: GraphJob, choose: Callable[[LayerList], int]
) -> tuple[LoadedModel, SampledModel, Cut]:
    """Load and cut the first layers: more of them where so few cannot be cut."""
    assert job.loaded.sample is not None  # noqa: S101 (the caller has checked)
    sampled = job.loaded.sample(choose)
    while True:
        sampled.check_alike()
        short = replace(job.loaded, read=sampled.short)
        try:
            return short, sampled, _cut(replace(job, loaded=short), sampled)
        except NotSampled:
            raise
        except Exception as error:  # whatever the plugin or the model's code raises
            # Either may need a layer of a higher number, or one counted from the end. A defect of
            # its own shows again with the whole model.
            if isinstance(_first_cause(error), ProxyError) and not isinstance(error, PluginError):
                raise
            if sampled.is_whole:
                raise NotSampled(f"its first layers cannot be cut alone: {error}") from error
        sampled = job.loaded.sample(partial(at_most, 2 * sampled.count))


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cut(job: GraphJob, sampled: SampledModel | None = None) -> Cut:
    job.progress("cutting and verifying")
    try:
        cut = cut_model(job.loaded, job.hooks, job.kind)
    except CutError:
        _check_finite(job.loaded, sampled)
        raise
    if job.loaded.adapters and cut.proxy.flow != "causal-lm":
        raise UnsupportedModelError(
            f"adapters can be inputs of causal LMs, not of a {cut.proxy.flow} model such as "
            f"{job.loaded.source}",
            "Merge them (without --adapter-as-input).",
        )
    return replace(cut, proxy=tap_proxy(cut.proxy, job.taps))


def _check_finite(loaded: LoadedModel, sampled: SampledModel | None) -> None:
    """Name the weight that is NaN, where that is why a cut failed."""
    for name, parameter in loaded.model.named_parameters():
        if not parameter.is_meta and bool(parameter.isnan().any()):
            where = sampled.sources.file_of(name) if sampled is not None else None
            raise CheckpointError(
                f"{name} of {where or loaded.source} has NaN elements",
                "Download the checkpoint again; a model with such weights gives only NaN.",
            )


def _full_depth(job: GraphJob, sampled: SampledModel, cut: Cut) -> tuple[Part, ...]:
    """The parts of ``cut`` with all layers; a layer without weights gives random numbers in them.

    Raises:
        NotSampled: They cannot be built, or are other parts.
    """
    if sampled.is_whole:
        return cut.proxy.parts
    try:
        with few_pages(sampled.model), marked_layers(sampled.model, [sampled.layers], runs=True):
            proxy = job.hooks.build_proxy(
                model=sampled.model,
                embedding=cut.sites["embedding"],
                lm_head=cut.sites["lm_head"],
                kind=job.kind,
                options=job.loaded.options,
            )
        with ExitStack() as marks:
            for part in proxy.parts:
                marks.enter_context(marked_layers(part.module, runs=True))
            parts = tap_proxy(proxy, job.taps).parts
    except Exception as error:  # whatever the plugin or the model's code raises without layers
        raise NotSampled(f"it cannot be cut without its layers: {error}") from error
    if [_edges(part) for part in parts] != [_edges(part) for part in cut.proxy.parts]:
        raise NotSampled("its first layers are cut into other parts than all of them")
    return parts


def _edges(part: Part) -> tuple[str, set[str], set[str]]:
    """The name of a part, and those of its inputs and outputs without the numbers of layers."""

    def kinds(specs: Sequence[TensorSpec]) -> set[str]:
        return {LAYER_NAME.sub(r"\1.N\3", spec.name) for spec in specs}

    return part.name, kinds(part.inputs), kinds(part.outputs)


def _traced_sample(
    part: Part, whole: Part, sampled: SampledModel, names: Mapping[int, str], opset: int | None
) -> tuple[TracedPart, TracedPart]:
    """The graph of a part with all layers, and that with its first layers."""
    try:
        traced, check = trace_sample(whole, part, names, opset)
    except NotRepeatable as error:
        raise NotSampled(str(error)) from error
    except ExportError as error:
        raise NotSampled(f"its layers cannot be traced alone: {error}") from error
    _check_own_weights(traced, part, sampled)
    return traced, check


def _check_own_weights(traced: TracedPart, part: Part, sampled: SampledModel) -> None:
    """Make sure that each layer uses weights of its own, and all that layers of its kind use."""
    path = sampled.layers.path
    weights: dict[int, set[str]] = {}
    for name in traced.weights:
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            weights.setdefault(int(number), set()).add(rest)
    for index, kind in enumerate(sampled.layers.kinds):
        first = sampled.layers.kinds.index(kind)
        if weights.get(index, set()) != weights.get(first, set()):
            raise NotSampled(
                f"layer {index} of the {part.name} part was given other weights than layer {first}"
            )


def _check_separate(loaded: LoadedModel, graphs: Graphs) -> None:
    """Make sure that no weight of a site remains in the body of a split proxy."""
    if graphs.cut.proxy.kind != "split":
        return
    for name, site in graphs.cut.sites.items():
        vocabulary = site_weights(loaded, site)
        for traced_part, part in zip(graphs.traced, graphs.cut.proxy.parts, strict=True):
            remaining = vocabulary & set(traced_part.weights)
            if part.weights != "vocabulary" and remaining:
                raise CutError(
                    f"the {part.name} part still holds {min(remaining)}, which belongs to the "
                    f"{name}",
                    f"That is not where the model's {name} is, or the plugin's build_proxy must "
                    "keep it out of that part.",
                )
