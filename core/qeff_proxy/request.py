"""The user's request: the input of the ``preprocess`` hook."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qeff_proxy.errors import UsageError

__all__ = ["Request", "refuse_others", "refuse_unused"]

_CALLED = {"prompts": "text", "audio": "sound", "images": "images"}
_GIVEN_BY = {
    "prompts": "Give prompts.",
    "audio": "Give a sound file or samples.",
    "images": "Give prompts and images.",
}
#: Of WAV and WebP, FLAC, Ogg, MP3, PNG, JPEG and GIF.
_FIRST_BYTES = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\x89PNG", b"\xff\xd8\xff", b"GIF8")


@dataclass(frozen=True)
class Request:
    """One call's input, before any processor has seen it.

    A sound or image file in the place of a prompt is refused: its path would be read as text.

    Attributes:
        prompts: Texts, one per row of the batch; empty where there are none.
        audio: Sound: paths, or arrays of samples.
        images: Paths, URLs, bytes, PIL images or arrays.
        inputs: Tensors or arrays made by the user (``input_ids`` …); they win over the rest.
        options: What else the family's ``preprocess`` understands (``language``, ``task`` …).
    """

    prompts: Sequence[str] = ()
    audio: Sequence[Any] = ()
    images: Sequence[Any] = ()
    inputs: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `UsageError` where a prompt is the path of such a file."""
        for text in self.prompts:
            if is_media(text):
                raise UsageError(
                    f"{text} is a sound, image or video file, and a text is taken there",
                    "Give a prompt, and images with --image FILE or images=…, sounds with --audio "
                    "FILE or audio=…, where the model takes them.",
                )

    def with_defaults(self, options: Mapping[str, Any]) -> Request:
        """The same request, with these options where it does not give them itself."""
        return replace(self, options={**options, **self.options})


def refuse_others(request: Request, *takes: str) -> None:
    """Refuse inputs that the model would otherwise ignore, for a ``preprocess`` hook.

    Args:
        request: The user's request; one with ready-made tensors passes, whatever else it has.
        takes: Which of ``"prompts"``, ``"audio"`` and ``"images"`` the model takes.

    Raises:
        UsageError: The request has an input that the model does not take.
    """
    if request.inputs is not None:
        return
    for name, called in _CALLED.items():
        if name not in takes and len(getattr(request, name)):
            taken = " and ".join(_CALLED[kind] for kind in takes)
            raise UsageError(f"this model takes {taken}, not {called}", _GIVEN_BY[takes[-1]])


def refuse_unused(inputs: Mapping[str, Any], takes: Iterable[str]) -> None:
    """Refuse tensors that would change nothing, for a flow or a ``preprocess`` hook.

    Args:
        inputs: Tensors by name; ``None`` stands for one that is not there. ``token_type_ids`` of
            zeros, which tokenizers give for models that have no token types, pass.
        takes: The names that something uses.

    Raises:
        UsageError: Names the input that nothing uses.
    """
    takes = tuple(takes)
    for name, value in inputs.items():
        if name in takes or value is None:
            continue
        if name == "token_type_ids" and _all_zero(value):
            continue
        raise UsageError(
            f"nothing uses the input {name!r}",
            f"Leave it out: this model takes {', '.join(takes)}"
            + (", and counts positions from the mask." if name == "position_ids" else "."),
        )


def is_media(path: Any) -> bool:
    """Whether a text is the path of a sound, an image or a video, by its name or first bytes."""
    # An int would be the number of an open file. A prompt may be too long for `Path`.
    if not isinstance(path, str) or not os.path.isfile(path):  # noqa: PTH113
        return False
    kind = str(mimetypes.guess_type(path)[0]).partition("/")[0]
    if kind in ("audio", "image", "video"):
        return True
    with Path(path).open("rb") as file:
        return file.read(4).startswith(_FIRST_BYTES)


def _all_zero(value: Any) -> bool:
    import numpy as np

    return not np.any(np.asarray(value))
