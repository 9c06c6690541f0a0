"""An example input of a model, for users without an input at hand.

A flow with a method ``example_request`` makes it (`qeff_proxy.flows.ExampleFlow`); for other flows
it is a line of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.errors import UsageError
from qeff_proxy.flows.flow import ExampleFlow, load_flow
from qeff_proxy.parts import Proxy
from qeff_proxy.request import Request

DEFAULT_PROMPT = "One morning, Anna went to the market and"
#: The default question about an image.
DEFAULT_QUESTION = "What is this?"
_RANDOM_IDS = 16


def example_request(export: Export, processor: Any, proxy: Callable[[], Proxy]) -> Request:
    """An input that an exported model can run on.

    Args:
        export: Of the model.
        processor: Its tokenizer or processor, if it has one.
        proxy: Makes its live parts, for flows that need them.

    Raises:
        UsageError: No input can be made for it.
    """
    flow = load_flow(export.flow)
    if isinstance(flow, ExampleFlow):
        return flow.example_request(export, processor, proxy)
    return text_example(export, processor)


def text_example(export: Export, processor: Any) -> Request:
    """A line of text, or random token ids where the model has no tokenizer.

    Raises:
        UsageError: It has none, and its export has no size of the vocabulary.
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
