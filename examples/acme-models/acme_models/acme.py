"""The hooks for Acme. Importing this registers the architecture with transformers."""

from __future__ import annotations

from qeff_proxy import Site, hookimpl

import acme_models.model  # noqa: F401 (registers the architecture)

#: The version of the hook API that this module uses.
qeff_proxy_api = 1


@hookimpl
def locate_embedding() -> Site:
    """The token embedding. The position embedding stays in the body."""
    return Site("stack.words")


@hookimpl
def locate_lm_head() -> Site:
    """The head's part also contains the operators that follow it, a soft cap."""
    return Site("to_words", follows=("div", "tanh", "mul"))
