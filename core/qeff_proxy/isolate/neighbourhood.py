"""The operators around a cause, and how its error spreads to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qeff_proxy.isolate.blame import over_peak
from qeff_proxy.isolate.operators import Operators, Values, names_read

Role = Literal["before", "cause", "after"]

#: So many operators before a cause, and after it, are kept.
_MOST = 6


@dataclass(frozen=True)
class Neighbour:
    """One operator of a neighbourhood.

    Attributes:
        node: Its name in the graph.
        operator: Its type.
        role: Whether the cause reads it, is it, or is read by it.
        reads: The nodes of the neighbourhood that it reads.
        shape: Of its first output.
        error: Of its outputs with only the cause on the backend: the largest over the peak.
    """

    node: str
    operator: str
    role: Role
    reads: tuple[str, ...]
    shape: tuple[int, ...]
    error: float


def neighbourhood(
    operators: Operators, numbers: Sequence[int], actual: Values
) -> tuple[Neighbour, ...]:
    """Describe a cause with what it reads and what reads it.

    Args:
        operators: The layer.
        numbers: The operators of the cause.
        actual: The cause's outputs on the backend; its inner values are not known.

    Returns:
        The operators, in the order in which they run.
    """
    values = operators.run_on(actual, without=numbers)
    made = {
        str(value.name): number
        for number, node in enumerate(operators.nodes)
        for value in node.outputs
        if value.name
    }
    cause = set(numbers)
    before = {
        made[name]
        for number in numbers
        for name in names_read(operators.nodes[number])
        if name in made
    } - cause
    outputs = {str(v.name) for number in numbers for v in operators.nodes[number].outputs}
    after = [
        number
        for number, node in enumerate(operators.nodes)
        if number not in cause and not outputs.isdisjoint(names_read(node))
    ]
    roles: dict[int, Role] = dict.fromkeys(sorted(before)[-_MOST:], "before")
    roles |= dict.fromkeys(numbers, "cause")
    roles |= dict.fromkeys(after[:_MOST], "after")
    found = []
    for number in sorted(roles):
        node = operators.nodes[number]
        names = [str(value.name) for value in node.outputs if value.name]
        readers = [made[name] for name in names_read(node) if name in made]
        found.append(
            Neighbour(
                str(node.name),
                node.op_type,
                roles[number],
                tuple(str(operators.nodes[one].name) for one in readers if one in roles),
                operators.values[names[0]].shape,
                max(over_peak(operators.values[name], values[name]) for name in names),
            )
        )
    return tuple(found)
