"""Spoken digits, to train and test the tiny speech recognizers.

espeak-ng (Debian's package of that name) synthesizes the speech. Held-out voices differ from the
training voices in the variant, which sets pitch, formants and the kind of voice; the accents are
the same.
"""

from __future__ import annotations

import argparse
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan")
TRAIN_VOICES = ("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f2", "f4", "Alex", "Annie", "Andy",
                "linda", "Mike", "belinda", "david")  # fmt: skip
HELD_OUT_VOICES = ("m4", "m7", "f3", "f5", "Andrea", "john")
MOST_WORDS = 5
_HEADER = 44
_ESPEAK_RATE = 22_050


@dataclass(frozen=True)
class Clip:
    """Spoken digits: ``samples [n]`` float32 at `RATE`, their text, and the voice."""

    samples: npt.NDArray[np.float32]
    text: str
    voice: str


def speak(text: str, voice: str, speed: int, pitch: int) -> npt.NDArray[np.float32]:
    """``text`` as samples ``[n]`` at `RATE`, peak 0.5, without silence at the ends."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    wave = subprocess.run(command, check=True, capture_output=True).stdout[_HEADER:]  # noqa: S603
    samples = np.frombuffer(wave[: len(wave) // 2 * 2], np.int16).astype(np.float32)
    samples = soxr.resample(samples, _ESPEAK_RATE, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return (samples * (0.5 / np.abs(samples).max())).astype(np.float32)


def clips(number: int, voices: tuple[str, ...], seed: int, longest: float = 4.8) -> list[Clip]:
    """Make clips of one to `MOST_WORDS` digits, none longer than ``longest`` seconds."""
    rng = random.Random(seed)  # noqa: S311 (digits, not secrets)
    wanted = []
    for _ in range(number):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, MOST_WORDS)))
        voice = f"{rng.choice(ACCENTS)}+{rng.choice(voices)}"
        wanted.append((text, voice, rng.randint(130, 190), rng.randint(30, 70)))
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(lambda arguments: speak(*arguments), wanted))
    made = [Clip(one, text, voice) for one, (text, voice, *_) in zip(spoken, wanted, strict=True)]
    return [clip for clip in made if len(clip.samples) <= longest * RATE]


def disturbed(
    samples: npt.NDArray[np.float32], rng: np.random.Generator, longest: float = 5.0
) -> npt.NDArray[np.float32]:
    """A training variation.

    Up to an eighth faster or slower (pitch and formants change too, which makes another voice),
    silence around two of three, another loudness, noise of 20 to 60 dB below.
    """
    samples = soxr.resample(samples, 1.0, rng.uniform(0.89, 1.125), quality="LQ")
    if rng.uniform() < 1 / 3:
        longest = 0.0
    room = max(0, int(longest * RATE) - len(samples))
    before = int(rng.integers(0, min(room, RATE // 2) + 1))
    behind = int(rng.integers(0, min(room - before, RATE // 2) + 1))
    result = np.pad(samples, (before, behind)) * rng.uniform(0.3, 1.8)
    noise = rng.standard_normal(len(result)) * 10 ** rng.uniform(-3, -1)
    return (result + noise * np.abs(result).max() * 0.3).astype(np.float32)


def word_errors(said: str, heard: str) -> int:
    """The words to insert, delete or replace to get from ``said`` to ``heard``."""
    wanted, found = said.split(), heard.split()
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """The word error rate of ``(said, heard)`` pairs."""
    errors = sum(word_errors(said, heard) for said, heard in pairs)
    return errors / sum(len(said.split()) for said, _ in pairs)


#: The recordings in the package: text and held-out voice.
RECORDINGS = (
    ("seven three one", "en-gb-scotland+f3"),
    ("two zero nine four", "en-us+m7"),
    ("eight five six", "en-gb+Andrea"),
    ("four four two", "en-gb-x-rp+m4"),
    ("one six", "en-us+john"),
    ("nine zero five three eight", "en-gb+f5"),
)


def main() -> None:
    """Write `RECORDINGS` as FLAC files, named by their text."""
    parser = argparse.ArgumentParser(description="Record spoken digits of held-out voices.")
    parser.add_argument("folder", type=Path, help="where to write them")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for text, voice in RECORDINGS:
        samples = np.pad(speak(text, voice, 155, 50), RATE // 5)
        soundfile.write(folder / f"{text.replace(' ', '-')}.flac", samples, RATE)


if __name__ == "__main__":
    main()
