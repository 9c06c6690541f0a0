"""The hooks for Acme. Importing this registers the architecture with transformers."""

from __future__ import annotations

from qeff_proxy import Site, hookimpl

import acme_models.model  # noqa: F401 (registers the architecture)

#: The version of the hooks that this was written for.
qeff_proxy_api = 1


@hookimpl
def locate_embedding() -> Site:
    """The table of words; that of places is no site, and stays in the body."""
    return Site("stack.words")


@hookimpl
def locate_lm_head() -> Site:
    """What follows it, a soft cap, goes into the head's part with it."""
    return Site("to_words", follows=("div", "tanh", "mul"))
