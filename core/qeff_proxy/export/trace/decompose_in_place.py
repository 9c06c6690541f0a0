"""Bring a traced graph to operators that ONNX has, without tracing it a second time.

``torch.onnx.export`` traces a ``torch.export`` program again to decompose it, and runs it again to
insert casts where dtypes differ: together two thirds of the cost of a trace. But nearly every
operator of a transformer has an ONNX counterpart; the few others are listed here, and for each one
there is an operator that does the same. So within `lowered_in_place`

1. `_plan` checks each node; where it does not know one of them, PyTorch decomposes the program;
2. otherwise `_rewrite` functions replace the operators in the graph itself;
3. dtypes are read from what the trace recorded, and only nodes that change are run again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from qeff_proxy.common.private_names import DECOMPOSING, find, operators
from qeff_proxy.common.shared_change import SharedChanges

_ATEN = torch.ops.aten
#: Checks of a trace's assumptions, which PyTorch removes from a graph to export, too.
_ASSERTIONS = operators(
    (
        "_assert_async.default",
        "_assert_async.msg",
        "_assert_scalar.default",
        "_assert_tensor_metadata.default",
        "sym_constrain_range_for_size.default",
    )
)
#: Operators whose result has the shape and dtype of their first argument.
_SAME_SHAPE = operators(
    ("clone.default", "detach.default", "index_put.default", "lift_fresh_copy.default")
)


@dataclass
class Lowering:
    """What became of the last program that was exported in a context.

    Attributes:
        begun: The program may have been changed.
        done: PyTorch did not have to decompose it.
    """

    begun: bool = False
    done: bool = False


_ACTIVE: ContextVar[Lowering | None] = ContextVar("lowered_in_place", default=None)
_CHANGES = SharedChanges()


@contextmanager
def lowered_in_place() -> Iterator[Lowering]:
    """Spare exports to ONNX in this context the second trace where possible."""
    lowering = Lowering()
    names = find(DECOMPOSING)
    if names is None:
        yield lowering
        return
    token = _ACTIVE.set(lowering)
    try:
        with _CHANGES.needed("prepare", partial(_replace, names)):
            yield lowering
    finally:
        _ACTIVE.reset(token)


def _replace(names: SimpleNamespace) -> Callable[[], object]:
    """Let exports lower their programs here, in contexts that asked for it."""
    attribute = DECOMPOSING["prepare"].rpartition(":")[2]

    def prepare(program: ExportedProgram, **options: Any) -> Any:
        lowering = _ACTIVE.get()
        if lowering is not None:
            lowering.begun, lowering.done = True, False
            lowering.begun = lowering.done = _lower(program, options["registry"], names)
            if lowering.done:
                return program
        return names.prepare(program, **options)

    setattr(names.exporter, attribute, prepare)
    return partial(setattr, names.exporter, attribute, names.prepare)


def _lower(program: ExportedProgram, registry: Any, names: SimpleNamespace) -> bool:
    """Lower a program in place; ``False``, with nothing lowered, where PyTorch must do it."""
    module = program.graph_module
    if any(True for _ in module.children()):
        return False  # branches and loops
    graph = module.graph
    graph.eliminate_dead_code()
    plan = _plan(graph, registry, names)
    if plan is None:
        return False
    for node, rewrite in plan:
        rewrite(node)
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    with names.symbolic_config(backed_size_oblivious=True):
        _insert_casts(module, names)
    module.recompile()
    return True


def _insert_casts(module: GraphModule, names: SimpleNamespace) -> None:
    """Cast arguments to the dtype that PyTorch would promote them to, as its own pass does."""
    interpreter: Any = names.promotion_interpreter

    class Recorded(interpreter):  # type: ignore[misc]
        """Takes the results that the trace recorded in place of running each node."""

        def run_node(self, node: Node) -> Any:
            if node.op != "call_function" or "val" not in node.meta:
                return torch.fx.Interpreter.run_node(self, node)
            rule = names.promotion_rule(node, self.type_promotion_table)
            if rule is not None:
                with self._set_current_node(node):
                    self._maybe_promote_node(node, rule)
            return node.meta["val"]

    insertion = names.promotion(module)
    table = insertion.interpreter.type_promotion_table
    insertion.interpreter = Recorded(module, table)
    insertion.run()


def _plan(
    graph: Graph, registry: Any, names: SimpleNamespace
) -> list[tuple[Node, Callable[[Node], None]]] | None:
    """The rewrite of each node that needs one; ``None`` where a node is unknown."""
    registered = set(names.implemented(registry))
    order = {node: index for index, node in enumerate(graph.nodes)}
    plan: list[tuple[Node, Callable[[Node], None]]] = []
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or target in _ASSERTIONS:
            continue
        if "val" not in node.meta and not _record_value(node):
            return None
        rewrite = _REWRITES.get(target)
        if rewrite is not None:
            can, do = rewrite
            if not can(node):
                return None
            plan.append((node, do))
        elif not isinstance(target, names.overload):
            if isinstance(target, names.operator_base):
                return None
        elif target._schema.is_mutable:  # noqa: SLF001 (of an operator)
            if _functional(target) not in registered or not _owns_its_memory(node, order, names):
                return None
            plan.append((node, _make_functional))
        elif target not in registered or _is_decomposed(target, names):
            return None
    return plan


def _is_decomposed(target: Any, names: SimpleNamespace) -> bool:
    """Whether PyTorch decomposes a composite operator even where it is asked to keep it."""
    return names.is_composite(target) and not names.can_be_kept(target)


def _record_value(node: Node) -> bool:
    """Record the result of a node that transformers inserted after the trace, where it is known."""
    if node.target not in _SAME_SHAPE or "val" not in node.args[0].meta:  # type: ignore[union-attr]
        return False
    node.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    return True


def _value(node: Any) -> Any:
    return node.meta.get("val")


def _always(_node: Node) -> bool:
    return True


def _become(node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Replace a node's operator; its name and metadata stay."""
    node.target, node.args, node.kwargs = target, args, kwargs


def _copy(node: Node) -> None:
    _become(node, _ATEN.clone.default, node.args[0])


def _convert(node: Node) -> None:
    source, dtype = node.args[0], _value(node).dtype
    if _value(source).dtype == dtype:
        _copy(node)
    else:
        _become(node, _ATEN._to_copy.default, source, dtype=dtype)  # noqa: SLF001 (an operator)


def _converts_a_tensor(node: Node) -> bool:
    return isinstance(_value(node.args[0]), torch.Tensor)


def _is_inference(node: Node) -> bool:
    return len(node.args) > 2 and node.args[2] is False


def _view(node: Node) -> None:
    _become(node, _ATEN.view.default, *node.args, **node.kwargs)


def _reverse(node: Node) -> None:
    axes = list(reversed(range(_value(node.args[0]).dim())))
    _become(node, _ATEN.permute.default, node.args[0], axes)


def _minimum(node: Node) -> None:
    _become(node, _ATEN.minimum.default, *node.args)


def _is_unpadded(node: Node) -> bool:
    return node.args[4:5] in ((), ("valid",)) and not node.kwargs


def _convolve(node: Node) -> None:
    no_padding = [[0, 0] for _ in node.args[4:5]]
    _become(node, _ATEN.conv2d.default, *node.args[:4], *no_padding, *node.args[5:])


def _normalize_weight(node: Node) -> None:
    direction: Any = node.args[0]
    length: Any = node.args[1]
    kept = _argument(node, 2, "dim", 0)
    axes = [axis for axis in range(_value(direction).dim()) if axis != kept]
    with node.graph.inserting_before(node):
        norm = node.graph.call_function(
            _ATEN.linalg_vector_norm.default, (direction, 2, axes, True)
        )
        scale = node.graph.call_function(_ATEN.div.Tensor, (length, norm))
    norm.meta = scale.meta = {**node.meta, "val": _value(length)}
    _become(node, _ATEN.mul.Tensor, direction, scale)


def _pools_equal_areas(node: Node) -> bool:
    counts: Any = node.args[1]
    sizes = (*_value(node.args[0]).shape[-2:], *counts)
    return all(isinstance(size, int) for size in sizes) and not any(
        size % count for size, count in zip(sizes[:2], sizes[2:], strict=True)
    )


def _pool(node: Node) -> None:
    source: Any = node.args[0]
    counts: Any = node.args[1]
    sizes = _value(source).shape[-2:]
    area = [size // count for size, count in zip(sizes, counts, strict=True)]
    _become(node, _ATEN.avg_pool2d.default, source, area, area)


def _argument(node: Node, position: int, name: str, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    assert isinstance(value, int)  # noqa: S101 (the operator's schema)
    return value


def _chunk_axis(node: Node) -> int:
    return _argument(node, 2, "dim", 0)


def _chunks_a_known_size(node: Node) -> bool:
    return isinstance(_value(node.args[0]).shape[_chunk_axis(node)], int)


def _split(node: Node) -> None:
    axis = _chunk_axis(node)
    size = _value(node.args[0]).shape[axis]
    _become(node, _ATEN.split.Tensor, node.args[0], -(-size // node.args[1]), axis)


def _flatten(node: Node) -> None:
    """Replace by a view; dynamic sizes come from nodes that hold them already."""
    source: Any = node.args[0]
    begin = _argument(node, 1, "start_dim", 0) % max(1, _value(source).dim())
    before = list(_value(source).shape)
    after: list[Any] = list(_value(node).shape)
    removed = len(before) - len(after)
    for axis, size in enumerate(after):
        if not isinstance(size, torch.SymInt):
            continue
        if axis == begin:
            after[axis] = -1
        else:
            after[axis] = _size_node(node, source, axis if axis < begin else axis + removed)
    _become(node, _ATEN.view.default, source, after)


def _size_node(node: Node, source: Node, axis: int) -> Node:
    size = _value(source).shape[axis]
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is _ATEN.sym_size.int and _value(earlier).node.expr == size.node.expr:
            return earlier  # type: ignore[no-any-return]
    with node.graph.inserting_before(node):
        size_node = node.graph.call_function(_ATEN.sym_size.int, (source, axis))
    size_node.meta = {**node.meta, "val": size}
    return size_node


#: Operators that PyTorch decomposes although ONNX, or another operator, does the same: whether that
#: holds for a node, and how the node is rewritten.
_REWRITES: dict[Any, tuple[Callable[[Node], bool], Callable[[Node], None]]] = {
    _ATEN.to.dtype: (_converts_a_tensor, _convert),
    _ATEN.to.device: (_converts_a_tensor, _convert),
    _ATEN.to.dtype_layout: (_converts_a_tensor, _convert),
    _ATEN.to.other: (_converts_a_tensor, _convert),
    _ATEN.contiguous.default: (_always, _copy),
    _ATEN.dropout.default: (_is_inference, _copy),
    _ATEN.reshape.default: (_always, _view),
    _ATEN.numpy_T.default: (_always, _reverse),
    _ATEN.min.other: (_always, _minimum),
    _ATEN.conv2d.padding: (_is_unpadded, _convolve),
    _ATEN._weight_norm.default: (_always, _normalize_weight),  # noqa: SLF001 (an operator)
    _ATEN.flatten.using_ints: (_always, _flatten),
    _ATEN.adaptive_avg_pool2d.default: (_pools_equal_areas, _pool),
    _ATEN.chunk.default: (_chunks_a_known_size, _split),
}


def _functional(target: Any) -> Any:
    """The operator that returns what this one writes into its first argument, or ``None``."""
    name = target._schema.name.rpartition("::")[2]  # noqa: SLF001 (of an operator)
    if not name.endswith("_") or target.namespace != "aten":
        return None
    packet = getattr(_ATEN, name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)  # noqa: SLF001 (of an operator)


def _may_share(node: Node, names: SimpleNamespace) -> bool:
    """Whether a node's result may share the memory of its arguments."""
    if node.op != "call_function":
        return True
    if node.target in _REWRITES:  # only a conversion to another dtype always allocates
        converts = _REWRITES[node.target][1] is _convert
        return not converts or _value(node).dtype == _value(node.args[0]).dtype
    if node.target is operator.getitem:
        return _may_share(node.args[0], names)  # type: ignore[arg-type]
    if not isinstance(node.target, names.overload):
        return isinstance(_value(node), torch.Tensor)
    schema = node.target._schema  # noqa: SLF001 (of an operator)
    if schema.is_mutable:  # it is made functional, and then allocates
        return False
    aliases = any(result.alias_info is not None for result in schema.returns)
    return _is_decomposed(node.target, names) or aliases


def _owns_its_memory(node: Node, order: dict[Node, int], names: SimpleNamespace) -> bool:
    """Whether only later nodes see what a node writes into its first argument."""
    written: Any = node.args[0]
    if not isinstance(written, torch.fx.Node) or _may_share(written, names):
        return False
    writes_another = any(
        isinstance(argument, torch.fx.Node) and argument is written for argument in node.args[1:]
    )
    before = [user for user in written.users if order[user] < order[node]]
    return not writes_another and not any(_may_share(user, names) for user in before)


def _make_functional(node: Node) -> None:
    written = node.args[0]
    nodes = list(node.graph.nodes)
    later = set(nodes[nodes.index(node) + 1 :])
    node.target = _functional(node.target)
    for user in list(written.users):  # type: ignore[union-attr]
        if user in later:
            user.replace_input_with(written, node)
