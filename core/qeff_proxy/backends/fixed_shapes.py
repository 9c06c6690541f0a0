"""Fixed shapes for runs of any size: which shapes serve a run, and how its tensors are padded.

- **query**: padded behind, with zeros.
- **past**: padded in front, with zeros. So the real positions of ``present`` = past + query lie in
  one piece, and are cut out without a copy.
- **attention masks**: padded keys are hidden with the lowest number that the mask has, but every
  padded query sees itself, so that no softmax is over nothing.
- **batch**: padded with rows of zeros.
- Any other axis keeps the size of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.backends.lengths import DEFAULT_CTX_LEN, DEFAULT_PREFILL_SEQ_LEN
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.parts import TensorSpec
from qeff_proxy.session.axes import Sizes, axes_of, is_sum, size_of, terms_of
from qeff_proxy.session.part_like import PartLike

__all__ = ["PADDED", "Plan", "lowest_of", "name_of", "pad_into", "real_region"]

#: Axes that are padded and cut.
PADDED = ("batch", "query", "past")


def name_of(sizes: Mapping[str, int]) -> str:
    """A specialization's name, fit for a file: ``batch-1.query-32.past-96``."""
    text = ".".join(f"{axis}-{size}" for axis, size in sizes.items())
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in text)


@dataclass(frozen=True)
class Plan:
    """The fixed shapes of one part.

    ``query`` is 1 in decode steps and ``prefill_seq_len`` in prefill chunks. ``past`` is the rest
    of ``ctx_len``, so that past and query together have ``ctx_len`` positions. Other axes have
    ``seq_len``, or the sizes of a run if that is not set.

    Attributes:
        axes: The part's dynamic axes.
        options: Of the compilation, with ``ctx_len`` and ``prefill_seq_len``.
    """

    axes: tuple[str, ...]
    options: CompileOptions

    @classmethod
    def of(cls, part: PartLike, options: CompileOptions) -> Plan:
        """The plan of a part."""
        return cls(axes_of(part), options)

    def specializations(self) -> list[Sizes]:
        """The shapes that are known before any run: prefill first, then decode.

        An axis that is neither batch, query nor past takes each ``seq_len``. If there are several
        such axes, or no ``seq_len``, only a run brings the sizes, and the list is empty.
        """
        free = [axis for axis in self.axes if axis not in PADDED]
        lengths = self.options.seq_len
        if free and (lengths is None or len(free) > 1):
            return []
        queries = [1]
        if "query" in self.axes:
            queries = sorted({self._prefill, 1}, reverse=True)
        shapes = []
        for query in queries:
            for length in lengths if free and lengths else (0,):
                sizes = {"batch": self.options.batch_size, "query": query, "past": 0}
                sizes["past"] = self._past(query, 0)
                sizes.update(dict.fromkeys(free, length))
                shapes.append({axis: sizes[axis] for axis in self.axes})
        return shapes

    def choose(self, real: Mapping[str, int]) -> Sizes:
        """The fixed shapes for a run.

        Args:
            real: Sizes of the run.

        Raises:
            UsageError: More positions, or a longer chunk, than was compiled for.
        """
        sizes = dict(real)
        if "batch" in sizes:
            sizes["batch"] = self.options.batch_size
        if "query" in sizes:
            sizes["query"] = self._query(real["query"])
        if "past" in sizes:
            self._check_context(real)
            sizes["past"] = self._past(sizes.get("query", 1), real["past"])
        return {axis: sizes[axis] for axis in self.axes}

    @property
    def _prefill(self) -> int:
        return self.options.prefill_seq_len or DEFAULT_PREFILL_SEQ_LEN

    @property
    def _context(self) -> int:
        return self.options.ctx_len or DEFAULT_CTX_LEN

    def _query(self, query: int) -> int:
        if query <= 1:
            return 1
        if query > self._prefill:
            raise UsageError(
                f"{query} positions must run at once, and prefill_seq_len is {self._prefill}",
                f"Compile with prefill_seq_len={query} or more.",
            )
        return self._prefill

    def _check_context(self, real: Mapping[str, int]) -> None:
        total = real["past"] + real.get("query", 1)
        if total > self._context:
            raise UsageError(
                f"{total} positions do not fit into a context of {self._context}",
                "Shorten the prompt, generate fewer tokens, or compile with a larger ctx_len.",
            )

    def _past(self, query: int, least: int) -> int:
        """Room for the past: the context without ``query``, if that is enough.

        A chunk that begins elsewhere than at a multiple of ``prefill_seq_len`` may need more.
        """
        room = self._context - query
        if room >= least and room > 0:
            return room
        return max(self._context - 1, 1)


def real_region(
    spec: TensorSpec, real: Mapping[str, int], sizes: Sizes, part: str
) -> tuple[slice, ...]:
    """Where the elements of a run lie in a tensor of fixed shape.

    Args:
        spec: Of the tensor.
        real: Sizes of the run.
        sizes: The fixed sizes.
        part: The part's name, for the error.

    Raises:
        BackendError: An axis depends on a padded size in another way than by a sum.
    """
    changed = {axis for axis in sizes if sizes[axis] != real[axis]}
    region = []
    for axis in spec.shape:
        if not changed & set(terms_of(axis)):
            region.append(slice(None))
        elif is_sum(axis):
            region.append(_place(axis, real, sizes))
        else:
            raise BackendError(
                f"the output {spec.name} of the {part} part has the axis {axis}, "
                f"which cannot be cut back to {dict(real)}",
                "Compile for the sizes of the run.",
            )
    return tuple(region)


def pad_into(
    buffer: Array,
    spec: TensorSpec,
    array: Array,
    real: Mapping[str, int],
    sizes: Sizes,
    mask_fill: float | None = None,
) -> None:
    """Write a run's input, padded, into a buffer of the fixed shape.

    Args:
        buffer: Of the fixed shape.
        spec: Of the input.
        array: The input.
        real: Sizes of the run.
        sizes: The fixed sizes.
        mask_fill: What hides a key, if the input is an attention mask.
    """
    buffer[...] = 0 if mask_fill is None else mask_fill
    where = tuple(_place(axis, real, sizes) for axis in spec.shape)
    buffer[where] = array if mask_fill is None else np.maximum(array, mask_fill)
    if mask_fill is not None:
        _let_see_themselves(buffer, where)


def lowest_of(dtype_name: str) -> float:
    """The lowest number of a floating point dtype."""
    dtype = numpy_dtype(dtype_name)
    if dtype.kind == "f":
        return float(np.finfo(dtype).min)
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def _place(axis: int | str, real: Mapping[str, int], sizes: Sizes) -> slice:
    """The real positions of an axis: behind the padding of the past, before any other padding."""
    terms = [term for term in terms_of(axis) if not term.isdigit()]
    if "past" in terms[1:]:
        raise BackendError(f"the axis {axis} cannot be padded", "Its past must come first.")
    begin = sizes["past"] - real["past"] if terms and terms[0] == "past" else 0
    return slice(begin, begin + size_of(axis, real))


def _let_see_themselves(mask: Array, where: tuple[slice, ...]) -> None:
    """Open the diagonal of padded queries and rows in ``[batch, 1, query, past + query]``."""
    rows, queries = mask.shape[0], mask.shape[-2]
    diagonal = mask.shape[-1] - queries + np.arange(queries)
    last_row, last_query = where[0].stop, where[-2].stop
    mask[last_row:, :, np.arange(queries), diagonal] = 0
    if last_query < queries:
        padded = np.arange(last_query, queries)
        mask[:rows, :, padded, diagonal[padded]] = 0
