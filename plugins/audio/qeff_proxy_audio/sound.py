"""The sounds of a request, and the feature extractor that takes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from qeff_proxy.arrays import Array, given_tensor
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError
from qeff_proxy.families.sound import SoundWarning, load_sound
from qeff_proxy.request import Request

__all__ = [
    "EXAMPLE",
    "SoundWarning",
    "feature_extractor_of",
    "load_sound",
    "sounds_of",
    "tensor_of",
]

#: A recording of speech in this package: two seconds at 16 kHz.
EXAMPLE = Path(__file__).parent / "checkpoints" / "recordings" / "two-zero-nine-four.flac"

#: The packages of processors that decode with a language model, and a file that they write.
_DECODERS = ("pyctcdecode", "kenlm")
_ALPHABET = "alphabet.json"


def feature_extractor_of(processor: Any) -> Any:
    """The feature extractor, which turns samples into the model's input: the processor or its part.

    Raises:
        UsageError: The processor has none.
    """
    extractor = getattr(processor, "feature_extractor", processor)
    if not hasattr(extractor, "sampling_rate"):
        alphabet = Path(str(getattr(processor, "name_or_path", ""))) / _ALPHABET
        missing = [name for name in _DECODERS if importlib.util.find_spec(name) is None]
        if missing and alphabet.is_file():
            raise UsageError(
                f"{alphabet} is for a processor with a language model, which needs "
                f"{' and '.join(missing)}",
                f"Run pip install {' '.join(missing)}; or, to do without the language model, write "
                "Wav2Vec2Processor as the processor_class of preprocessor_config.json.",
            )
        what = "no processor" if processor is None else type_named(processor)
        raise UsageError(
            f"sound needs a processor with a feature extractor, and there is {what}",
            "Put preprocessor_config.json beside the checkpoint, or pass processor=.",
        )
    return extractor


def tensor_of(inputs: Mapping[str, Any], name: str, axes: Sequence[str]) -> torch.Tensor:
    """A tensor of the user's ``inputs``, checked for its axes and finite numbers.

    Raises:
        UsageError: It is missing or invalid.
    """
    if name not in inputs:
        raise UsageError(
            f"there are no {name} among {', '.join(map(str, inputs)) or 'the inputs'}",
            "Pass the processor's output, samples, or a sound file.",
        )
    shape = f"Give [{', '.join(axes)}], none of them zero."
    tensor = given_tensor(name, inputs[name], shape)
    if tensor.dim() != len(axes) or 0 in tensor.shape:
        raise UsageError(f"{name} has shape {list(tensor.shape)}", shape)
    if tensor.is_complex() or not torch.isfinite(tensor).all():
        raise UsageError(f"{name} has NaN or infinite elements", "Repair the sound.")
    return tensor


def sounds_of(request: Request, rate: int) -> list[Array]:
    """The sounds of a request, ``[samples]`` float32 each.

    Raises:
        UsageError: There is none, or one cannot be used (`load_sound`).
    """
    if request.prompts or request.images or not request.audio:
        kind = "images" if request.images else "text" if request.prompts else "nothing"
        raise UsageError(
            f"a speech recognizer takes sound, not {kind}",
            "Give a sound file: qeff-proxy generate MODEL speech.wav, verify MODEL --audio "
            "speech.wav, or model.generate(inputs='speech.wav') in Python.",
        )
    sampling = request.options.get("sampling_rate")
    return [load_sound(sound, rate, sampling) for sound in request.audio]
