"""Clone the nodes of one layer for all layers of its kind.

The second half of `qeff_proxy.repeat`: `expand` finds the nodes of each traced layer by the module
path that every node carries, and what flows through the layers by following it from the inputs.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from qeff_proxy.trace import NAME_SCOPES, TracedPart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from qeff_proxy.parts import Part, TensorSpec
    from qeff_proxy.repeat import RepeatPlan

__all__ = ["LAYER_NAME", "expand"]

#: Names of what each layer takes or gives, caches and taps: what it is, layer, and what of it.
LAYER_NAME = re.compile(r"(past_key_values|present|hidden_states)\.(\d+)((?:\.\w+)?)")


def expand(
    traced: TracedPart, plan: RepeatPlan, part: Part, tensors: Mapping[str, torch.Tensor]
) -> TracedPart | None:
    """Put the full part together from the traced short one.

    Args:
        traced: The short part's graph. It is used up.
        plan: How it was shortened.
        part: The full part.
        tensors: The uncut model's parameters and buffers by name.

    Returns:
        The full part's graph, or ``None`` where the layers' nodes cannot be told apart.
    """
    templates = _find_templates(traced, plan)
    if templates is None:
        return None
    graph = traced.model.graph
    builder = _Builder(graph, plan, part, traced, tensors)
    current = templates[plan.kinds[0]].hidden_in
    for depth, kind in enumerate(plan.kinds):
        current = builder.clone(templates[kind], depth, current)
    builder.finish(templates, current)
    given = {value.name for value in graph.inputs}
    inputs = [spec for spec in part.inputs if spec.name in given]
    outputs = _full_outputs(traced, plan, part)
    if [value.name for value in graph.outputs] != [spec.name for spec in outputs]:
        return None  # some layer's output is none of its own nodes'
    return TracedPart(part.name, traced.model, builder.weights, tuple(inputs), outputs)


@dataclass
class _Template:
    """The nodes of one kind of layer, what comes in and what goes out."""

    position: int
    nodes: list[ir.Node]
    hidden_in: ir.Value
    hidden_out: ir.Value


def _find_templates(traced: TracedPart, plan: RepeatPlan) -> list[_Template] | None:
    """The nodes of each layer of the short part that depend on what flows through the layers."""
    graph = traced.model.graph
    flowing = _flowing_values(graph, traced)
    owner = _owners(graph, plan, flowing)
    count = len(set(plan.kinds))
    templates: list[_Template] = []
    stream: ir.Value | None = None
    for position in range(count):
        nodes = [node for node in graph if owner.get(node) == position]
        inside = {value for node in nodes for value in node.outputs}
        entering = {
            value
            for node in nodes
            for value in node.inputs
            if value is not None
            and value in flowing
            and value not in inside
            and not _is_cache_input(value)
        }
        leaving = {
            value for value in inside for use in value.uses() if owner.get(use.node) != position
        }
        if len(entering) != 1 or len(leaving) != 1:
            return None
        (hidden_in,), (hidden_out,) = entering, leaving
        if stream is not None and hidden_in is not stream:
            return None
        stream = hidden_out
        templates.append(_Template(position, nodes, hidden_in, hidden_out))
    return templates


def _owners(graph: ir.Graph, plan: RepeatPlan, flowing: set[ir.Value]) -> dict[ir.Node, int]:
    """Which layer of the short part a node must be cloned with, for those that must."""
    pattern = re.compile(re.escape(plan.scope) + r"\.(\d+)(\.|$)")
    positions = {node: _layer_of(node, pattern) for node in graph}
    # Rewritten nodes may have lost their module path: they belong where they come from and go to.
    for node in graph:
        if positions[node] is None and _scopes(node)[:1] != [""]:
            producers = [value.producer() for value in node.inputs if value is not None]
            before = {positions[one] for one in producers if one is not None} - {None}
            after = {positions[use.node] for value in node.outputs for use in value.uses()}
            if len(before & after) == 1:
                (positions[node],) = before & after
    owner: dict[ir.Node, int] = {}
    for node in graph:
        position = positions[node]
        if position is None:
            continue
        # What depends on a layer's own values is the layer's, even if only on their shapes.
        local = any(
            value is not None and owner.get(value.producer()) == position  # type: ignore[arg-type]
            for value in node.inputs
        )
        if local or any(value in flowing for value in node.outputs):
            owner[node] = position
    return owner


def _flowing_values(graph: ir.Graph, traced: TracedPart) -> set[ir.Value]:
    """Values that carry what flows through the layers; shapes, masks and positions don't."""
    sources = {"inputs_embeds", "input_ids"}
    flowing: set[ir.Value] = {
        value
        for value in graph.inputs
        if value.name in sources or (value.name and _is_cache_input(value))
    }
    for node in graph:
        if node.op_type == "Shape":
            continue
        given = [value for value in node.inputs if value is not None]
        if any(value in flowing or value.name in traced.weights for value in given):
            flowing.update(node.outputs)
    return flowing


def _is_cache_input(value: ir.Value) -> bool:
    return value.is_graph_input() and (value.name or "").startswith("past_key_values.")


def _layer_of(node: ir.Node, pattern: re.Pattern[str]) -> int | None:
    for scope in _scopes(node):
        match = pattern.match(scope)
        if match:
            return int(match[1])
    return None


def _scopes(node: ir.Node) -> list[str]:
    """The module paths a node comes from, outermost (the empty path) first."""
    text = node.metadata_props.get(NAME_SCOPES)
    return list(ast.literal_eval(text)) if text else []


class _Builder:
    """Clones templates into the graph."""

    def __init__(
        self,
        graph: ir.Graph,
        plan: RepeatPlan,
        part: Part,
        traced: TracedPart,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.tensors = tensors
        self.short_weights = traced.weights
        self.weights: dict[str, torch.Tensor] = {}
        self.short_inputs = {value.name: value for value in graph.inputs}
        self.short_outputs = {value.name: value for value in graph.outputs}
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.specs = {spec.name: spec for spec in (*part.inputs, *part.outputs)}
        self.added: list[ir.Node] = []

    def clone(self, template: _Template, depth: int, hidden: ir.Value) -> ir.Value:
        """Clone a template for the layer at ``depth``; give what it hands on."""
        made: dict[ir.Value, ir.Value] = {template.hidden_in: hidden}
        for node in template.nodes:
            copied = ir.Node(
                node.domain,
                node.op_type,
                [self._input(value, made, template, depth) for value in node.inputs],
                list(node.attributes.values()),
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}_layer_{depth}" if node.name else None,
            )
            scopes = node.metadata_props.get(NAME_SCOPES)
            if scopes is not None:
                old, new = f"{self.plan.scope}.{template.position}", f"{self.plan.scope}.{depth}"
                copied.metadata_props[NAME_SCOPES] = re.sub(
                    re.escape(old) + r"(?=[.'])", new, scopes
                )
            for before, after in zip(node.outputs, copied.outputs, strict=True):
                after.name = f"{before.name}_layer_{depth}"
                after.shape, after.type = before.shape, before.type
                made[before] = after
                self._output(before, after, template, depth)
            self.added.append(copied)
        return made[template.hidden_out]

    def _input(
        self,
        value: ir.Value | None,
        made: Mapping[ir.Value, ir.Value],
        template: _Template,
        depth: int,
    ) -> ir.Value | None:
        if value is None or value in made:
            return made[value] if value is not None else None
        name = value.name or ""
        if _is_cache_input(value):
            return self._cache_input(value, template, depth)
        if name in self.short_weights:
            return self._weight(value, self.plan.weights[depth].get(name, name))
        return value  # shared by all layers

    def _cache_input(self, value: ir.Value, template: _Template, depth: int) -> ir.Value:
        match = LAYER_NAME.fullmatch(value.name or "")
        if match is None or int(match[2]) != template.position:
            return value
        name = f"past_key_values.{depth}{match[3]}"
        if name not in self.inputs:
            shape = ir.Shape(list(self.specs[name].shape))
            self.inputs[name] = ir.Value(name=name, shape=shape, type=value.type)
        return self.inputs[name]

    def _weight(self, value: ir.Value, name: str) -> ir.Value:
        if name not in self.initializers:
            made = ir.Value(name=name, shape=value.shape, type=value.type)
            self.initializers[name] = made
            known = self.tensors if name in self.tensors else self.short_weights
            self.weights[name] = known[name]
        return self.initializers[name]

    def _output(self, before: ir.Value, after: ir.Value, template: _Template, depth: int) -> None:
        if not before.is_graph_output():
            return
        match = LAYER_NAME.fullmatch(before.name or "")
        if match is not None and int(match[2]) == template.position:
            after.name = f"{match[1]}.{depth}{match[3]}"
            self.outputs[after.name] = after

    def finish(self, templates: Sequence[_Template], hidden: ir.Value) -> None:
        """Join the clones to what comes after the layers, and drop the templates."""
        graph = self.graph
        last = templates[-1].hidden_out
        nodes = {node for template in templates for node in template.nodes}
        for use in list(last.uses()):
            if use.node not in nodes:
                use.node.replace_input_with(use.idx, hidden)
        # Whatever reads a cache only for its length may read any layer's.
        for name, value in self.short_inputs.items():
            replacement = self.inputs.get(name or "")
            if replacement is not None:
                for use in list(value.uses()):
                    if use.node not in nodes:
                        use.node.replace_input_with(use.idx, replacement)
        self._set_edges(hidden, last)
        graph.remove(nodes, safe=False)
        graph.extend(self.added)
        for name in list(graph.initializers):
            value = graph.initializers[name]
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
            elif name in self.short_weights:
                self.weights.setdefault(name, self.short_weights[name])
        for name, value in self.initializers.items():
            existing = graph.initializers.get(name)
            if existing is not None:  # used outside of the layers, too
                value.replace_all_uses_with(existing)
            else:
                graph.initializers[name] = value
        graph.sort()

    def _set_edges(self, hidden: ir.Value, last: ir.Value) -> None:
        graph = self.graph
        kept_inputs = [v for v in graph.inputs if not LAYER_NAME.fullmatch(v.name or "")]
        order = list(self.specs)
        graph.inputs.clear()
        graph.inputs.extend(
            sorted([*kept_inputs, *self.inputs.values()], key=lambda v: order.index(v.name or ""))
        )
        kept = [v for v in graph.outputs if not LAYER_NAME.fullmatch(v.name or "")]
        kept = [hidden if value is last else value for value in kept]
        graph.outputs.clear()
        graph.outputs.extend(
            [*kept, *sorted(self.outputs.values(), key=lambda v: order.index(v.name or ""))]
        )


def _full_outputs(traced: TracedPart, plan: RepeatPlan, part: Part) -> tuple[TensorSpec, ...]:
    """The full part's outputs with the axes that the trace of the short one found."""
    found = {spec.name: spec for spec in traced.outputs}
    outputs = []
    for spec in part.outputs:
        match = LAYER_NAME.fullmatch(spec.name)
        name = f"{match[1]}.{plan.kinds[int(match[2])]}{match[3]}" if match else spec.name
        outputs.append(replace(found.get(name, spec), name=spec.name))
    return tuple(outputs)
