"""The stage of a long job, shown in a notebook's cell."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
        said = html.escape(f"{title}: {stage} ({time.monotonic() - start:.0f} s)")
        return {"text/html": f"<pre>{said}</pre>", "text/plain": said}

    handle = display(line("starting"), raw=True, display_id=True)
    try:
        yield lambda stage: handle.update(line(stage), raw=True)
    finally:
        handle.update(line("ended"), raw=True)


def _display() -> Callable[..., Any] | None:
    """IPython's ``display``, where a kernel of a notebook runs this; IPython is never imported."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = sys.modules["IPython.display"].display
    return display
