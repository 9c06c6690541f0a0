"""The lengths a decoder is compiled for where its backend needs them and the user said none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from qeff_proxy.compile_options import CompileOptions

if TYPE_CHECKING:
    from qeff_proxy.session.session import PartLike

__all__ = ["DEFAULT_CTX_LEN", "DEFAULT_PREFILL_SEQ_LEN", "has_cache", "with_fixed_shapes"]

#: Of a decoder where the user says nothing; the values of QEfficient.
DEFAULT_PREFILL_SEQ_LEN = 32
DEFAULT_CTX_LEN = 128


def has_cache(parts: Iterable[PartLike]) -> bool:
    """Whether one of the parts takes a past."""
    axes = (axis for part in parts for spec in part.inputs for axis in spec.shape)
    return any("past" in re.findall(r"\w+", str(axis)) for axis in axes)


def with_fixed_shapes(options: CompileOptions, most_positions: int | None = None) -> CompileOptions:
    """The options with the lengths that a static backend needs, where the user said none.

    Args:
        options: What the user said.
        most_positions: How many the model has; ``None`` where it has no limit.
    """
    ctx_len = options.ctx_len or DEFAULT_CTX_LEN
    if options.ctx_len is None:
        ctx_len = max(ctx_len, options.prefill_seq_len or 0)
        ctx_len = min(ctx_len, most_positions or ctx_len)
    prefill = options.prefill_seq_len or min(DEFAULT_PREFILL_SEQ_LEN, ctx_len)
    return replace(options, ctx_len=ctx_len, prefill_seq_len=prefill)
