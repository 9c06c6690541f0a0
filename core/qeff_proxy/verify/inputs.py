"""What goes into a model that is verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.artifact.export_folder import Export
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.load_processor import load_processor
from qeff_proxy.run.example_request import DEFAULT_QUESTION

if TYPE_CHECKING:
    import torch

    from qeff_proxy.load.load_model import LoadedModel
    from qeff_proxy.plugins.hooks import Hooks
    from qeff_proxy.request import Request

__all__ = ["check_request", "describe_given", "processor_in", "tensors_of"]


def processor_in(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer or processor in a folder; ``None`` where it has none that can be loaded."""
    try:
        return load_processor(folder, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def check_request(
    request: Request, model: LoadedModel | Export, hooks: Hooks, trust_remote_code: bool
) -> tuple[Request, Mapping[str, torch.Tensor]]:
    """The request, complete, and its tensors; what the model does not take is refused.

    That is before anything is made. The tensors serve for all runs, so that what there is to say of
    an input (a sound of another rate) is said once.

    Raises:
        UsageError: The model does not take it.
    """
    if any(not str(prompt).strip() for prompt in request.prompts):
        raise UsageError("a prompt is empty", "Give some text, or token ids.")
    if request.images and not request.prompts and request.inputs is None:
        request = replace(request, prompts=(DEFAULT_QUESTION,))
    folder = model.processor_folder if isinstance(model, Export) else model.folder
    processor = processor_in(folder, trust_remote_code) if folder is not None else None
    if processor is None and folder is not None and request.prompts and request.inputs is None:
        load_processor(folder, trust_remote_code=trust_remote_code)  # says what is missing
    return request, tensors_of(request, hooks, processor)


def tensors_of(request: Request, hooks: Hooks, processor: Any) -> Mapping[str, torch.Tensor]:
    """What the ``preprocess`` hook makes of a request."""
    with quiet_loading():  # tokenizers warn of texts that are then refused
        return hooks.preprocess(processor=processor, request=request)


def describe_given(given: Any) -> Any:
    """A file's name, or the shape of an array."""
    if isinstance(given, str | Path):
        return str(given)
    shape = getattr(given, "shape", None)
    return list(shape) if shape is not None else type(given).__name__
