"""One input in several arrangements, and the outputs of its first row in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from qeff_proxy.arrays import Array
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
from qeff_proxy.backends.lengths import has_cache
from qeff_proxy.errors import UsageError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.tensor_names import LAYER_NAME, PRESENT
from qeff_proxy.verify.by_layer.part_run import Step

#: Positions of padding: few, and so many that a step's cache lies beyond the first 64 rows.
_PADDING = (5, 61)


@dataclass(frozen=True)
class Arrangement:
    """One way to run the same tokens.

    Attributes:
        name: What is different: ``in a batch``.
        tensors: The inputs.
        rows: How many there are of the batch.
        options: Compile options that the run has other values of.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    rows: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def arrangements(export: Export, tensors: Mapping[str, torch.Tensor]) -> list[Arrangement]:
    """An input alone, and in every other way that its model can run it.

    A decoder's padding is in front, an encoder's behind.

    Raises:
        UsageError: The input is a batch already.
    """
    ids = tensors.get("input_ids")
    found = [Arrangement("alone", tensors), Arrangement("once more", tensors)]
    if ids is None or ids.dim() != 2:  # sounds or images alone
        batch = {
            name: torch.cat([one, one.flip(-1) if one.is_floating_point() else one])
            for name, one in tensors.items()
        }
        return [*found, Arrangement("in a batch", batch, rows=2)]
    if ids.shape[0] != 1:
        raise UsageError(f"the input has {ids.shape[0]} rows", "Give one prompt, or one text.")
    decodes = has_cache(export.parts)
    rows = {"attention_mask": torch.ones_like(ids), **tensors}
    by_token = {name for name, tensor in rows.items() if tensor.shape == ids.shape}
    if by_token == set(rows):  # text alone: the other row is another text, and longer
        more = _PADDING[0]
        other = {name: torch.cat([one.flip(1), one[:, :more]], 1) for name, one in rows.items()}
        alone = _padded(rows, by_token, more, in_front=decodes)
        batch = {name: torch.cat([alone[name], other[name]]) for name in rows}
    else:
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in rows.items()}
    found.append(Arrangement("in a batch", batch, rows=2, options={"batch_size": 2}))
    for count in _PADDING:
        name = f"with {count} positions of padding"
        if decodes:
            found.append(Arrangement(name, _padded(rows, by_token, count)))
        else:  # an encoder's flow pads its rows itself
            length = ids.shape[1] + count
            found.append(Arrangement(name, tensors, options={"seq_len": (length,)}))
    if decodes:
        for name, size in (("in chunks of 3", 3), ("token by token", 1)):
            found.append(Arrangement(name, tensors, options={"prefill_seq_len": size}))
    return found


def first_row(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The row of a batch that has no padding; all of the batch where its tensors are no rows."""
    ids = tensors.get("input_ids")
    if ids is None or any(len(tensor) != len(ids) for tensor in tensors.values()):
        return tensors
    mask = tensors.get("attention_mask")
    row = 0 if mask is None else int(mask.sum(1).argmax())
    return {name: tensor[row : row + 1] for name, tensor in tensors.items()}


def _padded(
    rows: Mapping[str, torch.Tensor], by_token: set[str], count: int, *, in_front: bool = True
) -> dict[str, torch.Tensor]:
    """Inputs with padding, which the mask hides: zeros, but for the ids any token."""
    sides = (count, 0) if in_front else (0, count)
    padded = {name: pad(one, sides) if name in by_token else one for name, one in rows.items()}
    ids = rows["input_ids"]
    fill = ids[:, -1:].expand(-1, count)
    padded["input_ids"] = torch.cat([fill, ids] if in_front else [ids, fill], 1)
    return padded


class Outputs:
    """The outputs of every part in a run, but for the cache: a recorder of the flow.

    Args:
        export: The export that runs.
    """

    def __init__(self, export: Export) -> None:
        self._parts = export.parts
        self._arrays: dict[tuple[str, str], list[Array]] = {}
        #: The number of calls of a part.
        self.calls: dict[str, int] = {}

    def step(
        self,
        phase: str,  # noqa: ARG002 (part of the protocol)
        index: int,  # noqa: ARG002
        part: str,
        inputs: Mapping[str, Array],  # noqa: ARG002
        outputs: Mapping[str, Array],
        *,
        past_length: int,  # noqa: ARG002
    ) -> None:
        """Keep the outputs of one call of a part."""
        self.calls[part] = self.calls.get(part, 0) + 1
        for name, array in outputs.items():
            if not name.startswith(PRESENT):
                self._arrays.setdefault((part, name), []).append(array.copy())

    def layers(self, like: Outputs | None = None) -> Iterator[tuple[str, int | None, Step]]:
        """The part, the layer and its outputs: of all calls, joined along the positions.

        Args:
            like: The input's run alone: of each array, only what that has is returned. That is the
                first row, without padding.
        """
        for part in self._parts:
            by_layer: dict[int | None, Step] = {}
            for spec in part.outputs:
                calls = self._arrays.get((part.name, spec.name))
                if calls is None:
                    continue
                array = calls[0]
                axes = _axes_of(part, spec)
                if "query" in axes:
                    array = np.concatenate(calls, axes.index("query"))
                if like is not None:
                    first = like._arrays[part.name, spec.name]  # noqa: SLF001 (of its own class)
                    array = array[_place(axes, first, array)]
                match = LAYER_NAME.match(spec.name)
                by_layer.setdefault(int(match[2]) if match else None, {})[spec.name] = array
            last = by_layer.pop(None, {})
            yield from ((part.name, layer, step) for layer, step in sorted(by_layer.items()))
            if last:
                yield part.name, None, last


def _axes_of(part: ExportedPart, spec: TensorSpec) -> tuple[int | str, ...]:
    """The axes of an output; a part that takes one position at a time has an axis of one for it."""
    takes_one = has_cache([part]) and part.inputs[0].shape[1:2] == (1,)
    if not takes_one or 1 not in spec.shape[1:]:
        return spec.shape
    at = spec.shape.index(1, 1)
    return *spec.shape[:at], "query", *spec.shape[at + 1 :]


def _place(axes: tuple[int | str, ...], first: list[Array], array: Array) -> tuple[slice, ...]:
    """Where the outputs ``first`` of a run lie in those of another arrangement."""
    place = []
    for number, axis in enumerate(axes):
        size = first[0].shape[number]
        if axis == "query":  # padding, and the logits of other chunks, are in front
            size = sum(one.shape[number] for one in first)
            place.append(slice(array.shape[number] - size, None))
        else:
            place.append(slice(size))
    return tuple(place)
