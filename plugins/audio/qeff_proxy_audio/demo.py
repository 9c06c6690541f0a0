"""The demos of this package: two tiny recognizers transcribe spoken digits."""

from __future__ import annotations

from pathlib import Path

from qeff_proxy.demo.demos import Demo
from qeff_proxy.request import Request

from qeff_proxy_audio.sound import EXAMPLE

__all__ = ["wav2vec2", "whisper"]

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_GIVEN = f"{EXAMPLE.name}, read by a voice that was not trained on"


def whisper() -> Demo:
    """Whisper: encoder, then greedy decode steps."""
    return Demo(
        checkpoint=_CHECKPOINTS / "tiny-whisper",
        request=Request(audio=(EXAMPLE,)),
        given=_GIVEN,
        shown=lambda result: _heard(result.decoded["texts"][0]),
    )


def wav2vec2() -> Demo:
    """Wav2Vec2: one pass, then CTC decoding."""
    return Demo(
        checkpoint=_CHECKPOINTS / "tiny-wav2vec2",
        request=Request(audio=(EXAMPLE,)),
        given=_GIVEN,
        shown=lambda result: _heard(result.decoded[0]),
    )


def _heard(text: str) -> str:
    return f"{_GIVEN}:\n{text}"
