"""Which fixed shapes a part is compiled to, and which of them serves a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.backends.lengths import DEFAULT_CTX_LEN, DEFAULT_PREFILL_SEQ_LEN
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import UsageError
from qeff_proxy.session.axes import Sizes, axes_of
from qeff_proxy.session.part_like import PartLike

__all__ = ["PADDED", "Plan", "name_of", "runs_on_host"]

#: Axes that a static session can pad and cut: see `qeff_proxy_npu.fixed_shapes.session`.
PADDED = ("batch", "query", "past")


def runs_on_host(part: ExportedPart) -> bool:
    """Whether a part holds the vocabulary, which a proxy leaves to the host."""
    return part.weights == "vocabulary.safetensors"


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
