"""Transcribe a sound file with proxies of both kinds of speech recognizers.

    python audio_model.py [SOUND] [--whisper MODEL] [--wav2vec2 MODEL]

SOUND is a file that libsndfile reads (WAV, FLAC, OGG, MP3), with any sample rate and number of
channels; MODEL is a hub id or a local folder. The default SOUND is a recording of spoken digits
from the plugin package; --tiny uses the models of that package, which need no network.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from qeff_proxy import QEFFAutoModelForCTC, QEFFAutoModelForSpeechSeq2Seq

CHECKPOINTS = Path(str(files("qeff_proxy_audio"))) / "checkpoints"
RECORDING = CHECKPOINTS / "recordings" / "seven-three-one.flac"


def transcribe_with_whisper(name: str, sound: str) -> None:
    """Cut the token embedding and the output projection out of the decoder, and transcribe."""
    model = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(name, enable_proxy=True)
    model.compile(num_cores=16)
    result = model.generate(inputs=sound, generation_len=25, write_io=True)
    print(f"{name}: {result}")
    print(f"inputs and outputs of every step: {result.io_folder}")


def transcribe_with_ctc(name: str, sound: str) -> None:
    """Cut the head, from hidden states to letters, off the encoder, and transcribe."""
    model = QEFFAutoModelForCTC.from_pretrained(name, enable_proxy=True)
    model.compile(num_cores=16)
    result = model.generate(inputs=sound, write_io=True)
    print(f"{name}: {result}")
    print(f"inputs and outputs: {result.io_folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Transcribe a sound file with proxies.")
    parser.add_argument("sound", nargs="?", default=str(RECORDING), help="a sound file")
    parser.add_argument("--whisper", default="openai/whisper-tiny", metavar="MODEL")
    parser.add_argument("--wav2vec2", default="facebook/wav2vec2-base-960h", metavar="MODEL")
    parser.add_argument("--tiny", action="store_true", help="models that know ten digits")
    args = parser.parse_args()

    if args.tiny:
        args.whisper = str(CHECKPOINTS / "tiny-whisper")
        args.wav2vec2 = str(CHECKPOINTS / "tiny-wav2vec2")
    transcribe_with_whisper(args.whisper, args.sound)
    transcribe_with_ctc(args.wav2vec2, args.sound)


if __name__ == "__main__":
    main()
