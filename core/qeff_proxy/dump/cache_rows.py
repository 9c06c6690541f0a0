"""Which rows of the key and value cache a step added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from qeff_proxy.errors import DumpError
from qeff_proxy.tensor_names import PAST, PRESENT

# Inputs that a run computes once and feeds to every step; others are those of an adapter.
CONSTANT_INPUTS = ("cross_", "encoder_hidden_states")
# Of [batch, heads, rows, head_dim].
CACHE_AXIS = 2


def _query_length(inputs: Mapping[str, NDArray[Any]]) -> int | None:
    for name in ("inputs_embeds", "input_ids", "decoder_inputs_embeds", "decoder_input_ids"):
        if name in inputs and inputs[name].ndim >= 2:
            return int(inputs[name].shape[1])
    if "position_ids" in inputs and inputs["position_ids"].ndim >= 1:
        return int(inputs["position_ids"].shape[-1])
    return None


def locate_rows(
    graph_name: str,
    present: NDArray[Any],
    inputs: Mapping[str, NDArray[Any]],
    past_length: int | None,
) -> tuple[int, int]:
    """Return where the rows that this step added begin (counted over the run) and their number.

    Args:
        graph_name: Of ``present``, for errors.
        present: The cache after the step, [batch, heads, rows, head_dim].
        inputs: Of the part; their shapes tell the number of new rows.
        past_length: The valid rows before the step, or None when the cache's shape says.

    Raises:
        DumpError: The rows cannot be told, or lie outside of ``present``.
    """
    if present.ndim != 4:
        raise DumpError(f"{graph_name!r} has shape {present.shape}, not that of a cache")
    total = int(present.shape[CACHE_AXIS])
    query = _query_length(inputs)
    before = inputs.get(PAST + graph_name.removeprefix(PRESENT))
    rows_before = 0 if before is None or before.ndim != 4 else int(before.shape[CACHE_AXIS])
    if query is None:
        query = total - (rows_before if past_length is None else past_length)
    if past_length is None:
        if rows_before + query != total:
            raise DumpError(
                f"{graph_name!r} has {total} rows after {rows_before} and {query} new ones, so its "
                "new rows cannot be told",
                "Pass past_length for a cache of fixed size, or use kv='full'.",
            )
        past_length = rows_before
    if past_length < 0 or query < 0 or query > total:
        raise DumpError(
            f"{graph_name!r} has {total} rows; {query} new ones after {past_length} do not fit"
        )
    return past_length, query


def cut_rows(graph_name: str, present: NDArray[Any], begin: int, count: int) -> NDArray[Any]:
    """Return a view of the ``count`` new rows of ``present``, which begin at row ``begin``.

    A cache that keeps a window only has its new rows at its end.

    Raises:
        DumpError: ``present`` has fewer rows, or is not a cache.
    """
    if present.ndim != 4 or present.shape[CACHE_AXIS] < count:
        raise DumpError(f"{graph_name!r} has shape {present.shape}: no room for {count} new rows")
    end = min(begin + count, int(present.shape[CACHE_AXIS]))
    return present[:, :, end - count : end]
