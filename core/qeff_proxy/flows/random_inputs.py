"""Random inputs that a part can run on, to compare it with another form of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.flows.attention_masks import build_mask
from qeff_proxy.session.axes import size_of, terms_of
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.tensor_names import ADAPTER


def random_inputs(
    part: PartLike,
    sizes: Mapping[str, int],
    generator: np.random.Generator,
    first_position: int = 0,
) -> dict[str, Array]:
    """Random inputs without padding: causal masks, positions that follow the past.

    Args:
        part: The part.
        sizes: The size of each named axis.
        generator: Of the random numbers; integers are 0 or 1.
        first_position: Added to the positions.
    """
    masks = {mask.name: mask for mask in part.masks}
    feeds: dict[str, Array] = {}
    for spec in part.inputs:
        shape = [size_of(axis, sizes) for axis in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if spec.name in masks:
            padding = np.ones((shape[0], shape[3]), np.int64)
            feeds[spec.name] = build_mask(masks[spec.name], padding, shape[2], dtype)
        elif spec.name == "padding_mask" or dtype.kind == "b":
            feeds[spec.name] = np.ones(shape, dtype)
        elif spec.name == "position_ids":
            past = 0 if "past" in terms_of(spec.shape[-1]) else sizes.get("past", 0)
            positions = np.arange(shape[-1]) + past + first_position
            feeds[spec.name] = np.ascontiguousarray(np.broadcast_to(positions, shape).astype(dtype))
        elif dtype.kind in "iu":
            feeds[spec.name] = generator.integers(0, 2, shape).astype(dtype)
        else:
            numbers = generator.standard_normal(shape)
            if spec.name.endswith(ADAPTER):  # so that what it adds is as large as its input
                numbers /= np.sqrt(shape[1])
            feeds[spec.name] = numbers.astype(dtype)
    return feeds
