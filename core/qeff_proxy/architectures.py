"""Find the class of an architecture: one of transformers', or one that a package registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["architecture_class"]

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)


def architecture_class(name: str, config: PreTrainedConfig) -> Any:
    """The model class called ``name``; ``None`` where nothing of that name is known.

    Args:
        name: As a checkpoint's ``architectures`` has it.
        config: Its config, by whose class packages register theirs with the auto classes.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is not None:
        return found
    for auto_class in _AUTO_CLASSES:
        registered = getattr(transformers, auto_class)._model_mapping  # noqa: SLF001
        kind = registered.get(type(config), None)
        if getattr(kind, "__name__", None) == name:
            return kind
    return None
