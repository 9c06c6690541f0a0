"""The stage of a long job, shown in a notebook's cell."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def notebook_stages(title: str) -> Iterator[Callable[[str], None]]:
    """Show the stage of a job and its time in the cell that runs; nothing outside of a notebook.

    Yields a function to call with the name of each stage as it starts.
    """
    display = _display()
    if display is None:
        yield lambda _stage: None
        return
    start = time.monotonic()

    def line(stage: str) -> Any:
        said = f"{title}: {stage} ({time.monotonic() - start:.0f} s)"
        return {"text/html": f"<pre>{html.escape(said)}</pre>", "text/plain": said}

    handle = display(line("starting"), raw=True, display_id=True)
    try:
        yield lambda stage: handle.update(line(stage), raw=True)
    finally:
        handle.update(line("ended"), raw=True)


def in_notebooks(title: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a function that takes ``progress=`` show its stages in a notebook, if none is given."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def shown(*args: P.args, **kwargs: P.kwargs) -> T:
            if "progress" in kwargs:
                return function(*args, **kwargs)
            with notebook_stages(title) as progress:
                kwargs["progress"] = progress
                return function(*args, **kwargs)

        return shown

    return decorate


def _display() -> Callable[..., Any] | None:
    """IPython's ``display``, where a kernel of a notebook runs this; IPython is never imported."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = sys.modules["IPython.display"].display
    return display
