"""The default lengths of a decoder on a backend of fixed shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from qeff_proxy.compile_options import CompileOptions

if TYPE_CHECKING:
    from qeff_proxy.session.part_like import PartLike

#: The defaults of QEfficient.
DEFAULT_PREFILL_SEQ_LEN = 32
DEFAULT_CTX_LEN = 128


def has_cache(parts: Iterable[PartLike]) -> bool:
    """Whether one of the parts takes a past."""
    axes = (axis for part in parts for spec in part.inputs for axis in spec.shape)
    return any("past" in re.findall(r"\w+", str(axis)) for axis in axes)


def with_fixed_shapes(options: CompileOptions, most_positions: int | None = None) -> CompileOptions:
    """The options with default lengths where the user set none.

    Args:
        options: The user's.
        most_positions: The model's limit; ``None`` if it has none.
    """
    ctx_len = options.ctx_len or DEFAULT_CTX_LEN
    if options.ctx_len is None:
        ctx_len = max(ctx_len, options.prefill_seq_len or 0)
        ctx_len = min(ctx_len, most_positions or ctx_len)
    prefill = options.prefill_seq_len or min(DEFAULT_PREFILL_SEQ_LEN, ctx_len)
    return replace(options, ctx_len=ctx_len, prefill_seq_len=prefill)
