"""Turn the places of adapters in exported graphs into inputs.

In a trace they are weights like others, so that layers are repeated with places of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_proxy.arrays import dtype_name
from qeff_proxy.errors import UnsupportedModelError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.adapter_slots import slots_in

if TYPE_CHECKING:
    from qeff_proxy.export.model_graphs import Graphs
    from qeff_proxy.export.trace.trace_part import TracedPart


def slots_to_inputs(graphs: Graphs) -> None:
    """Make inputs of the adapters' places in all graphs.

    Raises:
        UnsupportedModelError: A module with places does not compute by itself, so that an adapter
            would change nothing.
    """
    names = set(slots_in(graphs.model))
    found = {name for part in graphs.traced for name in _freed(part, names)}
    if missing := sorted(names - found):
        raise UnsupportedModelError(
            f"no graph uses {missing[0]}: the model reads that module's weights in another way",
            "Merge the adapter (without --adapter-as-input).",
        )
    for check in graphs.checks:
        if check is not None:
            _freed(check, names)


def _freed(part: TracedPart, names: set[str]) -> list[str]:
    """Make inputs of the places in a part's graph; return their names."""
    graph = part.model.graph
    mine = [name for name in part.weights if name in names]
    for name in mine:
        tensor = part.weights.pop(name)
        graph.inputs.append(graph.initializers.pop(name))
        part.inputs += (TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)),)
    return mine
