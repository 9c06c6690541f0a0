"""Try a checkpoint's chat template before it is rendered, since it is a program that others wrote.

The sandbox of transformers keeps a template from files and attributes, not from memory and time:
``{{ 'a' * 10**10 }}`` takes 10 GB.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qeff_proxy.common.quiet import quiet_tracers
from qeff_proxy.errors import CheckpointError

__all__ = ["in_chat_template", "try_template"]

_MOST_BYTES = 2**30  # beyond what the process has
_SECONDS = 20


def try_template(render: Callable[[], object]) -> None:
    """Render in a child process of limited memory and time, on Linux.

    Args:
        render: Renders; what it raises is left to the caller's own rendering.

    Raises:
        CheckpointError: The template takes too much memory or time.
    """
    if sys.platform != "linux":
        return
    import resource  # Windows has no such module

    with quiet_tracers():  # Python 3.12 warns of a fork beside threads; the child uses none of them
        child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            most = pages * resource.getpagesize() + _MOST_BYTES
            resource.setrlimit(
                resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1])
            )
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child, even if it waits
            signal.alarm(_SECONDS)
            render()
        except MemoryError:
            os._exit(1)
        finally:
            os._exit(0)  # whatever else is wrong is raised again by the caller's own rendering
    if os.waitpid(child, 0)[1]:
        raise CheckpointError(
            f"the checkpoint's chat template takes more than {_MOST_BYTES // 2**30} GB or "
            f"{_SECONDS} s to render",
            "Correct its chat_template.jinja, or chat_template in its tokenizer_config.json.",
        )


def in_chat_template(tokenizer: Any, prompt: str, *, first: bool) -> str:
    """A prompt as the tokenizer's template writes it, if it has one; the first is tried before."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    message = [{"role": "user", "content": prompt}]
    render = partial(
        tokenizer.apply_chat_template, message, tokenize=False, add_generation_prompt=True
    )
    if first:
        try_template(render)
    text: str = render()
    return text
