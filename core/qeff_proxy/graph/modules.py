"""The modules that a graph's operators were traced from, by the model's own paths.

An operator belongs to a *unit*, the smallest thing that a precision is chosen for:

- the innermost module, where that has no other modules in it: ``model.layers.3.mlp.down_proj``;
- else the module and the operator's type: ``model.layers.3.self_attn:Softmax``.

Such names do not change when a model is exported again, with another opset, or with its layers
traced one by one or cloned. Operators that move elements and compute none belong to no unit.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qeff_proxy.graph.name_scopes import NAME_SCOPES

#: Node metadata: the unit that a node belongs to.
UNIT = "qeff_proxy.unit"
#: Operators that change no element; ``Gather`` is none of them where it reads a weight.
MOVES = frozenset(
    {"Identity", "Reshape", "Transpose", "Concat", "Split", "Slice", "Squeeze", "Unsqueeze"}
    | {"Expand", "Shape", "Size", "Cast", "Constant", "ConstantOfShape", "Range", "Gather"}
    | {"Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"}
)  # fmt: skip
_LAYER = re.compile(r"^(.*?)\.(\d+)(?=[.:]|$)")
_NUMBER = re.compile(r"\.\d+(?=[.:]|$)")
_NO_MODULE = "_empty_nn_module"


def module_path(node: ir.Node) -> str:
    """The innermost module that a node was traced from, as the part calls it; else ``""``."""
    noted = node.metadata_props.get(NAME_SCOPES, "")
    try:
        scopes = ast.literal_eval(noted) if noted else []
    except (SyntaxError, ValueError):
        return ""
    # The last is the operator's own name.
    path = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    return "" if path.startswith(_NO_MODULE) else path


def names_of_modules(model: ir.Model) -> tuple[str, str]:
    """How a module's path begins in the part, and in the model: ``module.decoder.``, ``model.``.

    Weights are called as in the model, nodes as in the part.
    """
    found: Counter[tuple[str, str]] = Counter()
    for name, value in model.graph.initializers.items():
        owner = str(name).split(".")[:-1]
        for node in value.consumers() if owner else ():
            path = module_path(node).split(".")
            same = 0
            while same < min(len(owner), len(path)) and owner[-1 - same] == path[-1 - same]:
                same += 1
            if same:
                begins = (path[: len(path) - same], owner[: len(owner) - same])
                found[".".join([*begins[0], ""]), ".".join([*begins[1], ""])] += 1
    return found.most_common(1)[0][0] if found else ("", "")


def name_units(model: ir.Model, site: str | None = None) -> None:
    """Note the unit of each operator in its metadata; a graph that has such notes keeps them.

    Args:
        model: The whole graph of a part.
        site: The module that the whole part is, such as the LM head; else ``None``.
    """
    nodes = list(model.graph)
    if any(UNIT in node.metadata_props for node in nodes):
        return
    begins, begins_in_model = names_of_modules(model)
    paths: dict[ir.Node, str] = {}
    for node in nodes:
        path = module_path(node)
        if not path:  # made by the exporter, of what made its first input
            makers = (v.producer() for v in node.inputs if v is not None)
            path = next((paths[one] for one in makers if one is not None and one in paths), "")
        paths[node] = path
    holders = {path[:at] for path in paths.values() for at, c in enumerate(path) if c == "."}
    for node, path in paths.items():
        moves = node.op_type in MOVES and not (node.op_type == "Gather" and _reads_weight(node))
        if not path or moves:
            continue
        if site is not None:
            node.metadata_props[UNIT] = site
            continue
        named = f"{path}.".replace(begins, begins_in_model, 1) if begins else f"{path}."
        named = named.rstrip(".") if f"{path}.".startswith(begins) else path
        node.metadata_props[UNIT] = f"{named}:{node.op_type}" if path in holders else named


def unit_of(node: ir.Node) -> str | None:
    """The unit of an operator, which `name_units` noted."""
    return node.metadata_props.get(UNIT)


def kind_of(unit: str) -> str:
    """What a unit is called in each layer: ``mlp.down_proj``, ``self_attn:Softmax``, ``Add``."""
    layer = _LAYER.match(unit)
    rest = unit[layer.end() :] if layer else unit
    return _NUMBER.sub(".*", rest).lstrip(".:") or unit


def layer_in(unit: str) -> str | None:
    """The path of the layer that a unit is in: ``model.layers.3``."""
    layer = _LAYER.match(unit)
    return layer[0] if layer else None


def chosen_units(paths: Iterable[str], units: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """The units that each path names: itself, or all that are in it."""
    known = list(units)
    return {
        path: frozenset(u for u in known if u == path or u.startswith((f"{path}.", f"{path}:")))
        for path in paths
    }


def weights_of(node: ir.Node) -> list[ir.Value]:
    """The floating weights that a node reads, or whose transpose or cast it reads."""
    found = []
    for value in node.inputs:
        while value is not None and not value.is_initializer():
            maker = value.producer()
            one = maker is not None and maker.op_type in ("Transpose", "Cast", "Identity")
            value = maker.inputs[0] if one and maker is not None else None
        if value is not None and value.dtype is not None and value.dtype.is_floating_point():
            found.append(value)
    return found


def _reads_weight(node: ir.Node) -> bool:
    first = node.inputs[0]
    if first is None or first.dtype is None:
        return False
    return first.dtype.is_floating_point() and first.is_initializer()
