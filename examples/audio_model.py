"""Transcribe a sound file with proxies of both kinds of speech recognizers.

    python audio_model.py [SOUND] [--whisper MODEL] [--wav2vec2 MODEL]

SOUND is a file that libsndfile reads (WAV, FLAC, OGG, MP3), of any rate and number of channels;
MODEL is a hub id or a local folder. Without SOUND, a second of noise stands for speech.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from qeff_proxy import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq


def transcribe_with_whisper(name: str, sound: Any) -> None:
    """An encoder, and a decoder whose token embedding and projection are cut out."""
    model = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(name, enable_proxy=True)
    model.compile(num_cores=16)
    result = model.generate(inputs=sound, generation_len=25, write_io=True)
    print(f"{name}: {result}")
    print(f"inputs and outputs of every step: {result.io_folder}")


def transcribe_with_ctc(name: str, sound: Any) -> None:
    """An encoder whose head, from hidden states to letters, is cut off."""
    model = QEFFAutoModelForCTC.from_pretrained(name, enable_proxy=True)
    model.compile(num_cores=16)
    result = model.generate(inputs=sound, write_io=True)
    print(f"{name}: {result}")
    print(f"inputs and outputs: {result.io_folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Transcribe a sound file with proxies.")
    parser.add_argument("sound", nargs="?", help="a sound file")
    parser.add_argument("--whisper", default="openai/whisper-tiny", metavar="MODEL")
    parser.add_argument("--wav2vec2", default="facebook/wav2vec2-base-960h", metavar="MODEL")
    args = parser.parse_args()

    sound: Any = args.sound
    if sound is None:
        sound = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    transcribe_with_whisper(args.whisper, sound)
    transcribe_with_ctc(args.wav2vec2, sound)


if __name__ == "__main__":
    main()
