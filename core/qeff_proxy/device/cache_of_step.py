"""Which rows of a cache a tool's file holds: all, those at one end of a buffer, or a step's own."""

from __future__ import annotations

from dataclasses import replace

from qeff_proxy.device.conventions import Rows
from qeff_proxy.device.index import PackedRun, PackedTensor
from qeff_proxy.dump.cache_rows import CACHE_AXIS
from qeff_proxy.errors import DumpError
from qeff_proxy.tensor_names import PAST, PRESENT


def is_cache(tensor: PackedTensor) -> bool:
    """Whether a tensor holds rows of a cache."""
    return tensor.name.startswith(PRESENT) and len(tensor.shape) == CACHE_AXIS + 2


def with_rows(tensor: PackedTensor, total: int, rows: Rows) -> PackedTensor:
    """A cache of ``total`` rows in its file, of which the valid ones are at the front or back."""
    count = tensor.valid_shape[CACHE_AXIS]
    shape, valid = list(tensor.shape), list(tensor.valid)
    shape[CACHE_AXIS] = total
    valid[CACHE_AXIS] = (0, count) if rows == "front" else (total - count, total)
    return replace(tensor, shape=tuple(shape), valid=tuple(valid))


def new_rows(tensor: PackedTensor, run: PackedRun) -> PackedTensor:
    """A cache of the rows of one step, padded as its query is."""
    if run.past_length is None or not is_cache(tensor):
        raise DumpError(f"{run.label} says no past length, so {tensor.name} has no new rows")
    count = tensor.valid_shape[CACHE_AXIS] - run.past_length
    before = tensor.name.replace(PRESENT, PAST, 1)
    past = next((one.shape[CACHE_AXIS] for one in run.inputs if one.name == before), None)
    total = count if past is None else tensor.shape[CACHE_AXIS] - past
    shape, valid = list(tensor.shape), list(tensor.valid)
    shape[CACHE_AXIS], valid[CACHE_AXIS] = total, (0, count)
    return replace(tensor, shape=tuple(shape), valid=tuple(valid))
