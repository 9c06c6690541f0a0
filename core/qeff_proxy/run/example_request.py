"""An example of what a model takes, for whoever has a model and no input at hand.

A flow knows what its models take: one that has a method ``example_request`` is asked
(`qeff_proxy.flows.ExampleFlow`); for the others it is a line of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qeff_proxy.artifact.export_folder import Export
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.flow import ExampleFlow, load_flow
from qeff_proxy.parts import Proxy
from qeff_proxy.request import Request

__all__ = ["DEFAULT_PROMPT", "DEFAULT_QUESTION", "example_request", "text_example"]

DEFAULT_PROMPT = "One morning, Anna went to the market and"
#: What is asked about an image where nothing else is.
DEFAULT_QUESTION = "What is this?"
_RANDOM_IDS = 16


def example_request(export: Export, processor: Any, proxy: Callable[[], Proxy]) -> Request:
    """Something that an exported model can be run on.

    Args:
        export: Of the model.
        processor: Its tokenizer or processor; ``None`` where it has none.
        proxy: Makes its parts, live: for flows that need to look at them.

    Raises:
        UsageError: There is no input that can be made for it.
    """
    flow = load_flow(export.flow)
    if isinstance(flow, ExampleFlow):
        return flow.example_request(export, processor, proxy)
    return text_example(export, processor)


def text_example(export: Export, processor: Any) -> Request:
    """A line of text, or random token ids where the model has no tokenizer.

    Raises:
        UsageError: It has none, and its export does not say how many tokens there are.
    """
    if processor is not None:
        return Request(prompts=(DEFAULT_PROMPT,))
    rows = export.settings.get("embedding_rows")
    if rows is None:
        from qeff_proxy.load.load_model import load_config

        rows = getattr(load_config(export.processor_folder), "vocab_size", None)
    if rows is None:
        raise UsageError(
            f"{export.model['source']} has no tokenizer, and no input was given",
            "Give token ids or tensors.",
        )
    ids = np.random.default_rng(0).integers(0, rows, (1, _RANDOM_IDS))
    return Request(inputs={"input_ids": ids})
