"""Which tensor of the graph a tool's file name means.

Tools write ``/``, ``.`` and ``:`` as ``_``, put an underscore before a digit, and add
``_RetainedState``, ``_native`` or ``:0``. A name is compared as it is, then without regard to
punctuation, then without these endings, the last one apart; the first comparison that fits any
tensor decides, and two tensors that fit are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from qeff_proxy.errors import DumpError

_RETAINED = re.compile(r"_(?:Internal)?RetainedState\Z")
_PAST = re.compile(r"past_(key|value)[._](\d+)\Z")


def file_stem(name: str) -> str:
    """A graph's name as a file's: what is no letter, digit, dot or dash becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _of_graph(name: str) -> str:
    """A tool's name for a cache, or a native file, as the graph has it."""
    retained = _RETAINED.sub("", name.removesuffix("_native"))
    past = _PAST.match(retained)
    return f"present.{past[2]}.{past[1]}" if past else retained


def match_name(said: str, names: Iterable[str], where: str) -> str | None:
    """The graph's name that a tool's name means, or None.

    Args:
        said: What the tool calls it: a file's name without its ending.
        names: The graph's names.
        where: The file, for the error.

    Raises:
        DumpError: It may mean several; lists them.
    """
    known = list(names)
    short = _of_graph(said)
    shorter = re.sub(r"[:_]0\Z", "", short)
    for spelling, simplify in (
        (said, str),
        (_plain(said), _plain),
        (_plain(short), _plain),
        (_plain(shorter), _plain),
    ):
        fits = [name for name in known if simplify(name) == spelling]
        if len(fits) > 1:
            raise DumpError(
                f"{where} may be any of {', '.join(fits)}",
                f"Say which: --name '{said}={fits[0]}'.",
            )
        if fits:
            return fits[0]
    return None


def name_said(said: str, group: str, options: Mapping[str, str]) -> str | None:
    """The graph's name that ``--name`` gives a file: empty leaves it out, None says nothing.

    Args:
        said: What the tool calls it.
        group: Of the run, which may stand before it: ``body*/output_0``.
        options: File name or glob → graph name; the last one that matches counts.
    """
    chosen = [name for glob, name in options.items() if means(glob, said, group)]
    return chosen[-1] if chosen else None


def means(glob: str, said: str, group: str) -> bool:
    """Whether the glob of a ``--name`` matches what the tool calls a file of a group."""
    names = (said, f"{group}/{said}")
    return glob in names or any(fnmatchcase(each, glob) for each in names)
