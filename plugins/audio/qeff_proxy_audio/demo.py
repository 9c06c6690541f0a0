"""The demos of this package: two tiny recognizers transcribe spoken digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from qeff_proxy.arrays import to_array
from qeff_proxy.demo.demos import Demo
from qeff_proxy.demo.parity import Parity, parity_of_dump, parity_of_logits
from qeff_proxy.request import Request

from qeff_proxy_audio.sound import EXAMPLE

if TYPE_CHECKING:
    from qeff_proxy.dump import Dump
    from transformers import PreTrainedModel

__all__ = ["wav2vec2", "whisper"]

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_GIVEN = f"{EXAMPLE.name}, read by a voice that was not trained on"


def whisper() -> Demo:
    """Whisper: encoder, then greedy decode steps."""
    return Demo(
        checkpoint=_CHECKPOINTS / "tiny-whisper",
        request=Request(audio=(EXAMPLE,)),
        given=_GIVEN,
        parity=_whisper_parity,
        shown=lambda result: _heard(result.decoded["texts"][0]),
    )


def wav2vec2() -> Demo:
    """Wav2Vec2: one pass, then CTC decoding."""
    return Demo(
        checkpoint=_CHECKPOINTS / "tiny-wav2vec2",
        request=Request(audio=(EXAMPLE,)),
        given=_GIVEN,
        parity=_ctc_parity,
        shown=lambda result: _heard(result.decoded[0]),
    )


def _heard(text: str) -> str:
    return f"{_GIVEN}:\n{text}"


def _whisper_parity(model: PreTrainedModel, dump: Dump) -> Parity:
    features = torch.from_numpy(dump.array("prefill", 0, "encoder.in.input_features"))
    return parity_of_dump(
        model, dump, ids_name="decoder_input_ids", inputs={"input_features": features}
    )


def _ctc_parity(model: PreTrainedModel, dump: Dump) -> Parity:
    values = torch.from_numpy(dump.array("prefill", 0, "body.in.input_values"))
    with torch.no_grad():
        expected = to_array(model(values).logits.float())
    return parity_of_logits(expected[0], dump.array("prefill", 0, "lm_head.out.logits")[0])
