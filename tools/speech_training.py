"""Shared code to train the tiny speech recognizers: arguments, the loop, the test.

Clips with few words come first: a model learns alignment faster on one word than on five.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from spoken_digits import (
    HELD_OUT_VOICES,
    MOST_WORDS,
    RATE,
    TRAIN_VOICES,
    clips,
    disturbed,
    word_error_rate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt
    from spoken_digits import Clip

    Sounds = list[npt.NDArray[np.float32]]

__all__ = ["parse_arguments", "test", "train", "write"]

_BATCH = 16
# After this share of the steps, clips of any length are used.
_GROWING = 0.2


def parse_arguments(name: str, output: Path, steps: int) -> argparse.Namespace:
    """The arguments of a training script; seeds torch and sets its threads."""
    parser = argparse.ArgumentParser(description=f"Train the tiny {name} checkpoint.")
    parser.add_argument("--output", type=Path, default=output, help="folder to write")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, not from noise")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", type=int, default=4000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    return arguments


def train(
    arguments: argparse.Namespace,
    parameters: Iterable[torch.nn.Parameter],
    peak_rate: float,
    loss_of: Callable[[Sounds, list[str]], torch.Tensor],
) -> None:
    """Train on clips of `TRAIN_VOICES`.

    Args:
        arguments: Uses ``steps`` and ``clips``; with ``start``, clips of any length from the start.
        parameters: The parameters to train.
        peak_rate: The learning rate after the warm-up, which is a tenth of the steps.
        loss_of: Computes the loss from sounds, ``[samples]`` each, and their texts.
    """
    rng = np.random.default_rng(0)
    training = clips(arguments.clips, TRAIN_VOICES, 1)
    training.sort(key=lambda clip: len(clip.text.split()))
    words = np.array([len(clip.text.split()) for clip in training])
    parameters = list(parameters)
    count = sum(parameter.numel() for parameter in parameters)
    print(f"{count} parameters, {len(words)} clips", flush=True)
    optimizer = torch.optim.AdamW(parameters, peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=arguments.steps, pct_start=0.1
    )
    began = time.monotonic()
    mean = 0.0
    for step in range(arguments.steps):
        grown = 1.0 if arguments.start else step / (_GROWING * arguments.steps)
        most = 1 + MOST_WORDS * grown
        chosen = rng.integers(0, np.searchsorted(words, most, side="right"), _BATCH)
        batch = [training[index] for index in chosen]
        sounds = [disturbed(clip.samples, rng) for clip in batch]
        loss = loss_of(sounds, [clip.text for clip in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / (step % 100 + 1)
        if step % 100 == 99 or step == arguments.steps - 1:
            print(f"step {step:5d}  loss {mean:.4f}  {time.monotonic() - began:5.0f} s", flush=True)
            mean = 0.0


def test(transcribe: Callable[[npt.NDArray[np.float32]], str]) -> None:
    """Print the word error rate on clips of `HELD_OUT_VOICES`, without and with added silence."""
    held_out = clips(300, HELD_OUT_VOICES, 2)
    for seconds in (0.0, 0.2):
        silence = int(seconds * RATE)
        pairs = {
            voice: [(clip.text, transcribe(np.pad(clip.samples, silence))) for clip in of_voice]
            for voice, of_voice in _by_voice(held_out).items()
        }
        rate = word_error_rate([pair for of_voice in pairs.values() for pair in of_voice])
        each = ", ".join(f"{name} {word_error_rate(pairs[name]):.1%}" for name in sorted(pairs))
        print(f"word error rate, {seconds} s of silence around: {rate:.1%} ({each})", flush=True)


def _by_voice(held_out: list[Clip]) -> dict[str, list[Clip]]:
    result: dict[str, list[Clip]] = {}
    for clip in held_out:
        result.setdefault(clip.voice.partition("+")[2], []).append(clip)
    return result


def write(model: Any, processor: Any, folder: Path) -> None:
    """Write the checkpoint, readable for all users."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
