"""Random inputs of a part, to trace or run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from qeff_proxy.session.axes import size_of

if TYPE_CHECKING:
    from qeff_proxy.parts import Part, TensorSpec

#: Sizes of dynamic axes during the trace. None of them is 1, which a trace would bake in, and no
#: two are alike, so that no two axes are taken for one.
TRACE_SIZES = {"batch": 2, "query": 3, "past": 5, "sequence": 7}


def sample_inputs(part: Part, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Zeros (ones for the padding mask) with the part's dtypes, dots as double underscores."""
    devices = (one.device for one in part.module.parameters() if not one.is_meta)
    device = next(devices, torch.device("cpu"))
    samples = {}
    for name, spec in mangled_inputs(part):
        shape = [size_of(axis, sizes) for axis in spec.shape]
        make = torch.ones if spec.name == "padding_mask" else torch.zeros
        samples[name] = make(shape, dtype=getattr(torch, spec.dtype), device=device)
    return samples


def mangled_inputs(part: Part) -> Iterator[tuple[str, TensorSpec]]:
    """The inputs of a part by their names as Python arguments: dots as double underscores."""
    for spec in part.inputs:
        yield spec.name.replace(".", "__"), spec
