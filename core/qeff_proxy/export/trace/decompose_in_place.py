"""Bring a traced graph to operators that ONNX has without tracing it a second time.

``torch.onnx.export`` traces what ``torch.export`` gave once more, to decompose it, and then runs it
once more, to see where dtypes must be made alike: two thirds of what a trace costs. But nearly
every operator of a transformer has an ONNX counterpart already; the few that have not are named
here, and each has one operator that says the same. So within `lowered_in_place`

1. `_plan` looks at each node; where one of them is none that it knows, PyTorch decomposes as ever;
2. else `_rewrite` exchanges the operators, in the graph as it is;
3. dtypes are looked up where the trace noted them, and only what must change is run again.
"""

from __future__ import annotations

import operator
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._export.utils import _check_valid_to_preserve, _is_cia_op
from torch.fx.experimental import _config as symbolic_config
from torch.onnx._internal.exporter import _core, _fx_passes
from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
from torch.onnx._internal.fx.passes.type_promotion import (
    _TypePromotionInterpreter,
    get_type_promotion_rule,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.export import ExportedProgram
    from torch.fx import Graph, Node
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    Rewrite = Callable[[Node], bool]

__all__ = ["lowered_in_place"]

_PREPARE = _core._prepare_exported_program_for_export  # noqa: SLF001 (the one place to step in)
_RUN_NODE = _TypePromotionInterpreter.run_node
_ATEN = torch.ops.aten
#: Checks of a trace's assumptions, which PyTorch drops from a graph to export, too.
_ASSERTIONS = frozenset(
    {
        _ATEN._assert_async.default,  # noqa: SLF001 (operators' names)
        _ATEN._assert_async.msg,  # noqa: SLF001
        _ATEN._assert_scalar.default,  # noqa: SLF001
        _ATEN._assert_tensor_metadata.default,  # noqa: SLF001
        _ATEN.sym_constrain_range_for_size.default,
    }
)
#: Operators that give a tensor of the shape and dtype of the one they are given first.
_ALIKE = frozenset(
    {
        _ATEN.clone.default,
        _ATEN.detach.default,
        _ATEN.index_put.default,
        _ATEN.lift_fresh_copy.default,
    }
)


@contextmanager
def lowered_in_place() -> Iterator[list[ExportedProgram]]:
    """Let exports to ONNX in this thread do without the second trace where they can.

    Yields:
        The programs that were lowered so.
    """
    done: list[ExportedProgram] = []
    thread = threading.get_ident()

    def prepared(program: ExportedProgram, *, registry: ONNXRegistry) -> ExportedProgram:
        if threading.get_ident() == thread and _lower(program, registry):
            done.append(program)
            return program
        lowered: ExportedProgram = _PREPARE(program, registry=registry)
        return lowered

    def noted(self: _TypePromotionInterpreter, node: Node) -> Any:
        if threading.get_ident() != thread:
            return _RUN_NODE(self, node)
        if node.op != "call_function" or "val" not in node.meta:
            return torch.fx.Interpreter.run_node(self, node)
        rule = get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    _core._prepare_exported_program_for_export = prepared  # noqa: SLF001
    _TypePromotionInterpreter.run_node = noted
    try:
        yield done
    finally:
        _core._prepare_exported_program_for_export = _PREPARE  # noqa: SLF001
        _TypePromotionInterpreter.run_node = _RUN_NODE


def _lower(program: ExportedProgram, registry: ONNXRegistry) -> bool:
    """Lower a program in place; ``False``, with nothing lowered, where PyTorch must do it."""
    module = program.graph_module
    if any(True for _ in module.children()):
        return False  # branches and loops
    graph = module.graph
    graph.eliminate_dead_code()
    plan = _plan(graph, registry)
    if plan is None:
        return False
    for node, rewrite in plan:
        rewrite(node)
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    with symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        _fx_passes.insert_type_promotion_nodes(module)
    module.recompile()
    return True


def _plan(graph: Graph, registry: ONNXRegistry) -> list[tuple[Node, Callable[[Node], None]]] | None:
    """What to do to which node; ``None`` where a node is none that is known."""
    registered = set(get_onnx_implemented_overloads(registry))
    order = {node: index for index, node in enumerate(graph.nodes)}
    plan: list[tuple[Node, Callable[[Node], None]]] = []
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or target in _ASSERTIONS:
            continue
        if "val" not in node.meta and not _note_value(node):
            return None
        rewrite = _REWRITES.get(target)
        if rewrite is not None:
            can, do = rewrite
            if not can(node):
                return None
            plan.append((node, do))
        elif not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001 (nowhere else)
            if isinstance(target, torch._ops.OperatorBase):  # noqa: SLF001
                return None
        elif target._schema.is_mutable:  # noqa: SLF001
            if _functional(target) not in registered or not _owns_its_memory(node, order):
                return None
            plan.append((node, _make_functional))
        elif target not in registered or _is_decomposed(target):
            return None
    return plan


def _is_decomposed(target: Any) -> bool:
    """Whether PyTorch decomposes a composite operator even where it is told to keep it."""
    return _is_cia_op(target) and not _check_valid_to_preserve(target)


def _note_value(node: Node) -> bool:
    """Note what a node gives that transformers put in afterwards, where that is easy to say."""
    if node.target not in _ALIKE or "val" not in node.args[0].meta:  # type: ignore[union-attr]
        return False
    node.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    return True


def _value(node: Any) -> Any:
    return node.meta.get("val")


def _always(_node: Node) -> bool:
    return True


def _become(node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Another operator, under the same name and with the same notes."""
    node.target, node.args, node.kwargs = target, args, kwargs


def _pass_on(node: Node) -> None:
    _become(node, _ATEN.clone.default, node.args[0])


def _convert(node: Node) -> None:
    source, dtype = node.args[0], _value(node).dtype
    if _value(source).dtype == dtype:
        _pass_on(node)
    else:
        _become(node, _ATEN._to_copy.default, source, dtype=dtype)  # noqa: SLF001


def _converts_a_tensor(node: Node) -> bool:
    return isinstance(_value(node.args[0]), torch.Tensor)


def _is_evaluated(node: Node) -> bool:
    return len(node.args) > 2 and node.args[2] is False


def _view(node: Node) -> None:
    _become(node, _ATEN.view.default, *node.args, **node.kwargs)


def _reverse(node: Node) -> None:
    axes = list(reversed(range(_value(node.args[0]).dim())))
    _become(node, _ATEN.permute.default, node.args[0], axes)


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
    """A view of the same sizes; those that vary are taken from nodes that have them already."""
    source: Any = node.args[0]
    begin = _argument(node, 1, "start_dim", 0) % max(1, _value(source).dim())
    before = list(_value(source).shape)
    after: list[Any] = list(_value(node).shape)
    behind = len(before) - len(after)
    for axis, size in enumerate(after):
        if not isinstance(size, torch.SymInt):
            continue
        if axis == begin:
            after[axis] = -1
        else:
            after[axis] = _size_node(node, source, axis if axis < begin else axis + behind)
    _become(node, _ATEN.view.default, source, after)


def _size_node(node: Node, source: Node, axis: int) -> Node:
    size = _value(source).shape[axis]
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is _ATEN.sym_size.int and _value(earlier).node.expr == size.node.expr:
            return earlier  # type: ignore[no-any-return]
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_ATEN.sym_size.int, (source, axis))
    made.meta = {**node.meta, "val": size}
    return made


#: Operators that PyTorch decomposes though they have an ONNX counterpart, or one operator that says
#: the same: whether that holds of a node, and what is done to it.
_REWRITES: dict[Any, tuple[Callable[[Node], bool], Callable[[Node], None]]] = {
    _ATEN.to.dtype: (_converts_a_tensor, _convert),
    _ATEN.to.device: (_converts_a_tensor, _convert),
    _ATEN.to.dtype_layout: (_converts_a_tensor, _convert),
    _ATEN.to.other: (_converts_a_tensor, _convert),
    _ATEN.contiguous.default: (_always, _pass_on),
    _ATEN.dropout.default: (_is_evaluated, _pass_on),
    _ATEN.reshape.default: (_always, _view),
    _ATEN.numpy_T.default: (_always, _reverse),
    _ATEN.flatten.using_ints: (_always, _flatten),
    _ATEN.chunk.default: (_chunks_a_known_size, _split),
}


def _functional(target: Any) -> Any:
    """The operator that gives what this one writes into its first argument, or ``None``."""
    name = target._schema.name.rpartition("::")[2]  # noqa: SLF001
    if not name.endswith("_") or target.namespace != "aten":
        return None
    packet = getattr(_ATEN, name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)  # noqa: SLF001


def _may_share(node: Node) -> bool:
    """Whether what a node gives may be the memory of what it is given."""
    if node.op != "call_function":
        return True
    if node.target in _REWRITES:  # only what is converted to another dtype is surely new
        converts = _REWRITES[node.target][1] is _convert
        return not converts or _value(node).dtype == _value(node.args[0]).dtype
    if node.target is operator.getitem:
        return _may_share(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        return isinstance(_value(node), torch.Tensor)
    if node.target._schema.is_mutable:  # noqa: SLF001 (made functional, it gives memory of its own)
        return False
    returns = node.target._schema.returns  # noqa: SLF001
    return _is_decomposed(node.target) or any(one.alias_info is not None for one in returns)


def _owns_its_memory(node: Node, order: dict[Node, int]) -> bool:
    """Whether nothing but what comes after sees what a node writes into its first argument."""
    written: Any = node.args[0]
    if not isinstance(written, torch.fx.Node) or _may_share(written):
        return False
    writes_another = any(
        isinstance(argument, torch.fx.Node) and argument is written for argument in node.args[1:]
    )
    before = [user for user in written.users if order[user] < order[node]]
    return not writes_another and not any(_may_share(user) for user in before)


def _make_functional(node: Node) -> None:
    written = node.args[0]
    later = False
    following = set()
    for one in node.graph.nodes:
        if later:
            following.add(one)
        later = later or one is node
    node.target = _functional(node.target)
    for user in list(written.users):  # type: ignore[union-attr]
        if user in following:
            user.replace_input_with(written, node)
