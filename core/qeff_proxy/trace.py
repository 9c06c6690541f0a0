"""From a part to an ONNX graph whose weights are still elsewhere.

1. `sample_inputs` makes tensors of the part's dtypes and axes.
2. transformers' ``OnnxExporter`` traces the part, unoptimized.
3. `_detach_weights` takes the weights out of the graph, so that nothing folds or copies them.
4. onnxscript's optimizer folds the rest.
5. `_name_axes` gives the dynamic axes the names of the specs, and `_check_axes` makes sure that
   none of them was frozen by the trace.
6. Inputs that reach no output are dropped, and so are traces of the machine that traced.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from qeff_proxy.errors import ExportError
from qeff_proxy.layer_calls import MarkedLayers, NotRepeatable, marked_layers
from qeff_proxy.layer_graphs import expand_layers
from qeff_proxy.layer_marks import TRANSLATIONS
from qeff_proxy.lowering import lowered_in_place
from qeff_proxy.parts import TensorSpec
from qeff_proxy.reasons import first_line
from qeff_proxy.torchlib import operators_read_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qeff_proxy.parts import Part

__all__ = ["NAME_SCOPES", "TRACE_SIZES", "TracedPart", "trace_part"]

#: Sizes of dynamic axes during the trace. None of them is 1, which a trace would bake in, and no
#: two are alike, so that no two axes are taken for one.
TRACE_SIZES = {"batch": 2, "query": 3, "past": 5, "sequence": 7}

#: Tensors smaller than this, in bytes, stay inside the ONNX file.
INLINE_BYTES = 1024

#: Node metadata that is kept: the module paths a node comes from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass
class TracedPart:
    """A part as an ONNX graph without its weights.

    Attributes:
        name: The part's name.
        model: The graph; initializers that are in ``weights`` have no value yet.
        weights: Initializer name → tensor. The tensors are the model's own, not copies.
        inputs: What the graph takes.
        outputs: What it gives.
        layers: How many layers were traced, where others were cloned from them; 0 for none.
        reason: Why layers that are alike were all traced; ``None`` where they were not, or are not.
    """

    name: str
    model: ir.Model
    weights: dict[str, torch.Tensor]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: int = 0
    reason: str | None = None


def trace_part(
    part: Part, names: Mapping[int, str], opset: int | None = None, *, repeat: bool = False
) -> TracedPart:
    """Trace one part.

    Args:
        part: What to trace. Its module is not changed.
        names: ``id`` of each parameter and buffer of the uncut model → its name there; weights
            are called by it.
        opset: ONNX opset, or ``None`` for the exporter's own choice.
        repeat: Trace one layer of each kind and clone its nodes for the others, where that can be
            (`qeff_proxy.layer_calls`).

    Raises:
        ExportError: The part cannot be traced, or the trace froze a dynamic axis.
    """
    if not repeat:
        return _traced(part, names, opset, None)
    try:
        with marked_layers(part.module) as marked, _axes_known(part):
            return _traced(part, names, opset, marked)
    except NotRepeatable as error:
        reason = str(error)
    except ExportError as error:  # what fails with marks may do without them
        reason = error.problem
    return replace(_traced(part, names, opset, None), reason=reason)


def _traced(
    part: Part, names: Mapping[int, str], opset: int | None, marked: MarkedLayers | None
) -> TracedPart:
    sizes = {**TRACE_SIZES, **part.trace_sizes}
    samples = sample_inputs(part, sizes)
    shapes = {name: _dynamic_axes(spec) for name, spec in _mangled(part)}
    config = OnnxConfig(dynamic_shapes=shapes, optimize=False, opset_version=opset)
    with _quiet(), operators_read_once(TRANSLATIONS if marked is not None else {}):
        try:
            program = _trace(part, samples, config)
        except NotRepeatable:
            raise
        except Exception as error:  # whatever torch.export meets in a model's code
            line = first_line(error)
            raise ExportError(
                f"the {part.name} part cannot be traced: {type(error).__name__}: {line}",
                "Run with --debug for the trace; a plugin can build this part in another way.",
            ) from error
        weights = _detach_weights(program, part, names)
        onnxscript.optimizer.optimize(program, input_size_limit=INLINE_BYTES)
    _check_opset(program, part, opset)
    _attach_weights(program, weights)
    if marked is not None and marked.calls:
        _expand(program, part, names, weights, marked)
    inputs = _restore_inputs(program, part)
    outputs = _restore_outputs(program, part)
    _name_axes(program, part)
    _check_axes(program, part)
    _clean(program)
    kept = [spec for value, spec in inputs if value.is_graph_input()]
    return TracedPart(
        part.name,
        program,
        {name: tensor for name, tensor in weights.items() if name in program.graph.initializers},
        tuple(kept),
        tuple(_spec_of(value, spec) for value, spec in outputs),
        len(marked.repeated) if marked is not None else 0,
    )


@contextlib.contextmanager
def _axes_known(part: Part) -> Iterator[None]:
    """Let a trace know from the start that axes of one name are equal.

    It would find out as it meets them, one layer's cache after the other, and so would not see that
    layers are called alike.
    """

    def note(_module: Any, _args: Any, given: dict[str, torch.Tensor]) -> None:
        if not torch.compiler.is_compiling():
            return
        sizes: dict[str, Any] = {}
        axes = [
            (axis, given[name].shape[index])
            for name, spec in _mangled(part)
            for index, axis in enumerate(spec.shape)
            if isinstance(axis, str)
        ]
        for axis, size in sorted(axes, key=lambda one: "+" in one[0]):
            terms = axis.replace(" ", "").split("+")
            known = all(term.isdigit() or term in sizes for term in terms)
            if known:
                torch._check(size == sum(int(t) if t.isdigit() else sizes[t] for t in terms))
            elif len(terms) == 1:
                sizes[axis] = size

    handle = part.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _expand(
    program: ir.Model,
    part: Part,
    names: Mapping[int, str],
    weights: dict[str, torch.Tensor],
    marked: MarkedLayers,
) -> None:
    """Put the nodes of each layer where but a mark stands for it."""

    def name_of(tensor: torch.Tensor, path: str) -> str:
        return names.get(id(tensor), f"{part.name}.{path}")

    expand_layers(program, marked.calls, weights, name_of, NAME_SCOPES)
    RemoveUnusedNodesPass()(program)


def _trace(part: Part, samples: dict[str, torch.Tensor], config: OnnxConfig) -> ir.Model:
    def export() -> ir.Model:
        program: ir.Model = OnnxExporter().export(part.module, samples, config=config).program
        return program

    with lowered_in_place() as lowered:
        try:
            return export()
        except NotRepeatable:
            raise
        except Exception:  # what it is, the other way will say
            if not lowered:
                raise
    return export()


def _check_opset(program: ir.Model, part: Part, opset: int | None) -> None:
    """Make sure that the graph has the opset asked for: the converter gives up in silence."""
    found = program.opset_imports.get("", 0)
    if opset is not None and found != opset:
        raise ExportError(
            f"the {part.name} part cannot be written in opset {opset}: its operators are those of "
            f"opset {found}",
            f"Ask for opset {found}, or for none.",
        )


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: itself, or the sum of the named axes in ``"past + query"``."""
    if isinstance(axis, int):
        return axis
    return sum(int(term) if term.isdigit() else sizes[term] for term in re.split(r"\s*\+\s*", axis))


def sample_inputs(part: Part, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Zeros (ones for the padding mask) with the part's dtypes, dots as double underscores."""
    try:
        device = next(part.module.parameters()).device
    except StopIteration:
        device = torch.device("cpu")
    samples = {}
    for name, spec in _mangled(part):
        shape = [axis_size(axis, sizes) for axis in spec.shape]
        make = torch.ones if spec.name == "padding_mask" else torch.zeros
        samples[name] = make(shape, dtype=getattr(torch, spec.dtype), device=device)
    return samples


def _mangled(part: Part) -> Iterator[tuple[str, TensorSpec]]:
    for spec in part.inputs:
        yield spec.name.replace(".", "__"), spec


def _dynamic_axes(spec: TensorSpec) -> dict[int, Any]:
    return {i: torch.export.Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracers' progress lines and version notes off the terminal.

    They go to the ``qeff_proxy.trace`` logger at debug level instead.
    """
    talkers = [
        logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnxscript", "onnx_ir")
    ]
    levels = [talker.level for talker in talkers]
    said = io.StringIO()
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
        if said.getvalue():
            logging.getLogger(__name__).debug("%s", said.getvalue())


def _detach_weights(
    program: ir.Model, part: Part, names: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Turn large initializers into graph inputs; give their tensors by their final name."""
    own: dict[str, torch.Tensor] = dict(part.module.named_parameters(remove_duplicate=False))
    own.update(part.module.named_buffers(remove_duplicate=False))
    graph = program.graph
    weights: dict[str, torch.Tensor] = {}
    for old_name, value in list(graph.initializers.items()):
        array = value.const_value
        if array is None:
            continue
        if array.nbytes < INLINE_BYTES and not isinstance(own.get(old_name), torch.nn.Parameter):
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
    """Make the inputs that stand for weights initializers again; forget those nothing uses."""
    graph = program.graph
    for value in list(graph.inputs):
        if value.name is not None and value.name in weights:
            graph.inputs.remove(value)
            if value.uses() or value.is_graph_output():
                graph.initializers[value.name] = value


def _restore_inputs(program: ir.Model, part: Part) -> list[tuple[ir.Value, TensorSpec]]:
    """Give inputs their own names, in the spec's order, and drop those that nothing uses."""
    graph = program.graph
    values = list(graph.inputs)
    if len(values) != len(part.inputs):
        raise ExportError(
            f"the {part.name} part was traced with {len(values)} inputs instead of "
            f"{len(part.inputs)}"
        )
    pairs = list(zip(values, part.inputs, strict=True))
    for value, spec in pairs:
        value.name = spec.name
    return pairs


def _restore_outputs(program: ir.Model, part: Part) -> list[tuple[ir.Value, TensorSpec]]:
    values = list(program.graph.outputs)
    if len(values) != len(part.outputs):
        raise ExportError(
            f"the {part.name} part was traced with {len(values)} outputs instead of "
            f"{len(part.outputs)}"
        )
    pairs = list(zip(values, part.outputs, strict=True))
    for value, spec in pairs:
        value.name = spec.name
    return pairs


def _name_axes(program: ir.Model, part: Part) -> None:
    """Rename torch's symbols (``s17``) to the specs' axis names, everywhere in the graph."""
    graph = program.graph
    mapping: dict[str, str] = {}
    for value, spec in zip(graph.inputs, part.inputs, strict=True):
        for dim, axis in zip(value.shape or (), spec.shape, strict=True):
            symbol = getattr(dim, "value", None)
            if isinstance(axis, str) and isinstance(symbol, str) and symbol.isidentifier():
                mapping.setdefault(symbol, axis)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, mapping) for dim in value.shape])
    for value, spec in zip(graph.inputs, part.inputs, strict=True):
        if value.shape is not None:
            dims = [
                axis if not isinstance(dim, int) else dim
                for dim, axis in zip(value.shape, spec.shape, strict=True)
            ]
            value.shape = ir.Shape(dims)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _renamed(dim: int | ir.SymbolicDim, mapping: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    name = re.sub(
        r"[A-Za-z_]\w*", lambda match: mapping.get(match.group(), match.group()), dim.value
    )
    return "past + query" if name == "query + past" else name


def _check_axes(program: ir.Model, part: Part) -> None:
    """Make sure that a dynamic axis of an input that is used did not become a constant."""
    for value, spec in zip(program.graph.inputs, part.inputs, strict=True):
        if not value.uses():
            continue
        for index, (dim, axis) in enumerate(zip(value.shape or (), spec.shape, strict=True)):
            if isinstance(axis, str) and isinstance(dim, int):
                raise ExportError(
                    f"the trace froze axis {index} ({axis}) of {spec.name} in the {part.name} "
                    f"part at {dim}",
                    "The model's code depends on that size; its plugin must trace it otherwise.",
                )
    for value, spec in zip(program.graph.outputs, part.outputs, strict=True):
        dims = list(value.shape or ())
        for index, axis in enumerate(spec.shape):
            if index < len(dims) and isinstance(axis, str) and isinstance(dims[index], int):
                raise ExportError(
                    f"the trace froze axis {index} ({axis}) of the output {spec.name} of the "
                    f"{part.name} part at {dims[index]}",
                    "The model's code depends on that size; its plugin must trace it otherwise.",
                )


def _clean(program: ir.Model) -> None:
    """Drop unused inputs, and what tells of the machine and code that traced."""
    graph = program.graph
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    for value in _values(graph):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
    program.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None
    graph.name = "graph"
    program.producer_name = "qeff-proxy"
    program.producer_version = None


def _spec_of(value: ir.Value, spec: TensorSpec) -> TensorSpec:
    """The output's spec with the axes that the trace found."""
    if value.shape is None:
        return spec
    dims = (dim if isinstance(dim, int) else dim.value for dim in value.shape)
    shape = tuple(
        dim if dim is not None else axis for dim, axis in zip(dims, spec.shape, strict=True)
    )
    return TensorSpec(spec.name, spec.dtype, shape)
