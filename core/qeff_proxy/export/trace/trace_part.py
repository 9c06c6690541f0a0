"""Trace a part to an ONNX graph that does not hold its weights.

1. `sample_inputs` makes tensors of the part's dtypes and axes.
2. transformers' ``OnnxExporter`` traces the part, unoptimized.
3. `_detach_weights` takes the weights out of the graph, so that nothing folds or copies them.
4. `qeff_proxy.graph.folding` folds the remaining constants.
5. `qeff_proxy.export.repeat.clone_layers` clones traced layers in place of the others.
6. `qeff_proxy.export.trace.graph_edges` names inputs, outputs and dynamic axes as the specs do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from qeff_proxy.common.messages import first_line
from qeff_proxy.common.quiet import quiet_tracers
from qeff_proxy.common.shared_change import one_model_at_a_time
from qeff_proxy.errors import ExportError
from qeff_proxy.export.repeat.clone_layers import expand_layers
from qeff_proxy.export.repeat.insert_layers import put_in
from qeff_proxy.export.repeat.mark_layers import (
    LayerCall,
    MarkedLayers,
    NotRepeatable,
    layers_traced,
    marked_layers,
)
from qeff_proxy.export.trace.decompose_in_place import lowered_in_place
from qeff_proxy.export.trace.graph_edges import separate_outputs, set_edges
from qeff_proxy.export.trace.lean_trace import without_notes
from qeff_proxy.export.trace.operator_table import operators_read_once
from qeff_proxy.graph.folding import fold_graph
from qeff_proxy.layers.layer_lists import LayerList, layer_lists, stored_weights
from qeff_proxy.load.mapped_memory import few_pages
from qeff_proxy.parts import Part, TensorSpec
from qeff_proxy.session.sample_inputs import TRACE_SIZES, mangled_inputs, sample_inputs

#: Tensors smaller than this, in bytes, stay inside the ONNX file.
INLINE_BYTES = 1024
#: Constants of more bytes are not folded: onnxscript's own limit.
_FOLDED_BYTES = 262_144


@dataclass
class TracedPart:
    """A part as an ONNX graph without its weights.

    Attributes:
        name: The part's name.
        model: The graph; initializers that are in ``weights`` have no value yet.
        weights: Initializer name → tensor. The tensors are the model's own, not copies.
        inputs: The graph's inputs.
        outputs: Its outputs.
        layers: How many layers were traced, where others were cloned from them; 0 for none.
        reason: Why each of several equal layers was traced; ``None`` where that did not happen.
    """

    name: str
    model: ir.Model
    weights: dict[str, torch.Tensor]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: int = 0
    reason: str | None = None


@one_model_at_a_time
def trace_part(
    part: Part, names: Mapping[int, str], opset: int | None = None, *, repeat: bool = False
) -> TracedPart:
    """Trace one part.

    Args:
        part: The part. Its module is not changed.
        names: ``id`` of each parameter and buffer of the uncut model → its name there, which the
            weight gets in the graph.
        opset: ONNX opset, or ``None`` for the exporter's own choice.
        repeat: Trace one layer of each kind and clone its nodes for the others, where possible
            (`qeff_proxy.export.repeat.mark_layers`).

    Raises:
        ExportError: The part cannot be traced, or the trace froze a dynamic axis.
    """
    reason = None
    if repeat:
        try:
            with _marked(part) as marked:
                program, weights = _graph_of(part, names, opset)
            return _finished(program, part, names, weights, marked.calls)
        except NotRepeatable as error:
            reason = str(error)
        except ExportError as error:  # it may succeed without marks
            reason = error.problem
    program, weights = _graph_of(part, names, opset)
    return replace(_finished(program, part, names, weights, []), reason=reason)


@one_model_at_a_time
def trace_sample(
    whole: Part, part: Part, names: Mapping[int, str], opset: int | None = None
) -> tuple[TracedPart, TracedPart]:
    """Trace a part of which only the first layers are loaded.

    Args:
        whole: The part with all layers; weights that are not loaded are on the meta device.
        part: The part with the loaded layers only.
        names: As in `trace_part`, of all layers.
        opset: As in `trace_part`.

    Returns:
        The graph of ``whole``, and that of ``part``.

    Raises:
        NotRepeatable: Layers cannot be cloned, or left out.
        ExportError: As in `trace_part`.
    """
    lists = [
        replace(found, layers=tuple(part.module.get_submodule(found.path).children()))
        for found in layer_lists(whole.module)
    ]
    with _marked(part, lists) as marked:
        program, weights = _graph_of(part, names, opset)
    shorter = _finished(program.clone(), part, names, dict(weights), marked.calls)
    seen, given = _run(whole)
    # Outputs may be numbered by other layers: an encoder's part by those of the decoder.
    whole = replace(whole, outputs=tuple(one for one in whole.outputs if one.name in given))
    calls = put_in(program, marked.calls, seen, whole, part)
    return _finished(program, whole, names, weights, calls), shorter


def _run(part: Part) -> tuple[MarkedLayers, set[str]]:
    """Run a part without the layers that are not loaded: how it calls them, and its outputs."""
    samples = sample_inputs(part, {**TRACE_SIZES, **part.trace_sizes})
    generator = torch.Generator().manual_seed(0)
    for name, tensor in samples.items():
        if tensor.is_floating_point():
            samples[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    pages = few_pages(part.module)  # before the layers are marked, which hides their modules
    with torch.no_grad(), pages, marked_layers(part.module, runs=True) as marked:
        marked.inputs = {spec.name: samples[name] for name, spec in mangled_inputs(part)}
        try:
            outputs = part.module(**samples)
        except NotRepeatable:
            raise
        except Exception as error:  # whatever a model's code raises without its layers
            raise NotRepeatable(f"it cannot be run without its layers: {error}") from error
    return marked, set(outputs)


def _graph_of(
    part: Part, names: Mapping[int, str], opset: int | None
) -> tuple[ir.Model, dict[str, torch.Tensor]]:
    """The traced graph, with a mark at the begin and end of each marked layer, and its weights."""
    sizes = {**TRACE_SIZES, **part.trace_sizes}
    samples = sample_inputs(part, sizes)
    shapes = {name: _dynamic_axes(spec) for name, spec in mangled_inputs(part)}
    config = OnnxConfig(dynamic_shapes=shapes, optimize=False, opset_version=opset)
    with quiet_tracers(), operators_read_once(), without_notes():
        try:
            program = _trace(part, samples, config)
        except NotRepeatable:
            raise
        except Exception as error:  # whatever a model's code makes torch.export raise
            cause = error.__cause__ or error  # the converter's own error says nothing
            line = first_line(cause)
            raise ExportError(
                f"the {part.name} part cannot be traced: {type(cause).__name__}: {line}",
                "Run with --debug for the trace; a plugin can build this part in another way.",
            ) from error
        weights = _detach_weights(program, part, names)
        fold_graph(program, input_size_limit=INLINE_BYTES, output_size_limit=_FOLDED_BYTES)
        separate_outputs(program.graph)
    _check_opset(program, part, opset)
    _attach_weights(program, weights)
    return program, weights


def _finished(
    program: ir.Model,
    part: Part,
    names: Mapping[int, str],
    weights: dict[str, torch.Tensor],
    calls: list[LayerCall],
) -> TracedPart:
    """The part's graph: the traced one with all layers and the names of the specs."""

    def name_of(tensor: torch.Tensor, path: str) -> str:
        return names.get(id(tensor), f"{part.name}.{path}")

    if calls:
        expand_layers(program, calls, weights, name_of)
        RemoveUnusedNodesPass()(program)
    inputs, outputs = set_edges(program, part)
    used = program.graph.initializers
    return TracedPart(
        part.name,
        program,
        {name: tensor for name, tensor in weights.items() if name in used},
        inputs,
        outputs,
        layers_traced(calls),
    )


@contextlib.contextmanager
def _marked(part: Part, lists: Sequence[LayerList] | None = None) -> Iterator[MarkedLayers]:
    """Trace one layer of each kind of a part; record the name of each symbol of its inputs' axes.

    A trace learns that two symbols are equal only when it meets both; without the names, calls of
    layers with caches of their own would look different.
    """
    with marked_layers(part.module, lists) as marked:

        def note(_module: Any, _args: Any, given: dict[str, torch.Tensor]) -> None:
            marked.begin()
            for name, spec in mangled_inputs(part):
                for size, axis in zip(given[name].shape, spec.shape, strict=True):
                    if isinstance(axis, str):
                        marked.axes[str(size)] = axis

        handle = part.module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield marked
        finally:
            handle.remove()


def _trace(part: Part, samples: dict[str, torch.Tensor], config: OnnxConfig) -> ir.Model:
    with lowered_in_place() as lowering:
        try:
            return _export(part, samples, config)
        except NotRepeatable:
            raise
        except Exception:
            if not lowering.begun:
                raise
    return _export(part, samples, config)  # the public way tells whose fault it was


def _export(part: Part, samples: dict[str, torch.Tensor], config: OnnxConfig) -> ir.Model:
    with _dtypes_kept(part):
        exported: Any = OnnxExporter().export(part.module, samples, config=config)
    # Before transformers 5.23 it returns torch's ``ONNXProgram``.
    program: ir.Model = exported.program if hasattr(exported, "program") else exported.model
    return program


@contextlib.contextmanager
def _dtypes_kept(part: Part) -> Iterator[None]:
    """Keep the dtypes of inputs that differ from the weights', such as states in float32.

    The exporter casts all inputs to the dtype of the first of the module's ``parameters()``.
    """
    weights = {p.dtype for p in part.module.parameters()}
    inputs = {getattr(torch, spec.dtype) for spec in part.inputs}
    if not weights or not any(d.is_floating_point for d in inputs - weights):
        yield
        return
    vars(part.module)["parameters"] = lambda recurse=True: iter(())  # noqa: ARG005
    try:
        yield
    finally:
        del vars(part.module)["parameters"]


def _check_opset(program: ir.Model, part: Part, opset: int | None) -> None:
    """Make sure that the graph has the requested opset: the converter gives up in silence."""
    written = program.opset_imports.get("", 0)
    if opset is not None and written != opset:
        raise ExportError(
            f"the {part.name} part cannot be written in opset {opset}: its operators are those of "
            f"opset {written}",
            f"Ask for opset {written}, or for none.",
        )


def _dynamic_axes(spec: TensorSpec) -> dict[int, Any]:
    return {i: torch.export.Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)}


def _detach_weights(
    program: ir.Model, part: Part, names: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Turn weights and large constants into graph inputs; return their tensors by final name."""
    own: dict[str, torch.Tensor] = dict(part.module.named_parameters(remove_duplicate=False))
    own.update(part.module.named_buffers(remove_duplicate=False))
    graph = program.graph
    stored = stored_weights(part.module)
    weights: dict[str, torch.Tensor] = {}
    for old_name, value in list(graph.initializers.items()):
        array = value.const_value
        if array is None:
            continue
        if array.nbytes < INLINE_BYTES and id(own.get(old_name)) not in stored:
            continue
        tensor = own[old_name] if old_name in own else torch.from_numpy(array.numpy().copy())
        name = names.get(id(tensor), f"{part.name}.{old_name}")
        del graph.initializers[old_name]
        value.const_value = None
        if name in weights:  # one weight under two names
            first = next(v for v in graph.inputs if v.name == name)
            value.replace_all_uses_with(first)
            continue
        value.name = name
        weights[name] = tensor
        graph.inputs.append(value)
    return weights


def _attach_weights(program: ir.Model, weights: Mapping[str, torch.Tensor]) -> None:
    """Turn the inputs that stand for weights into initializers again; drop unused ones."""
    graph = program.graph
    for value in list(graph.inputs):
        if value.name is not None and value.name in weights:
            graph.inputs.remove(value)
            if value.uses() or value.is_graph_output():
                graph.initializers[value.name] = value
