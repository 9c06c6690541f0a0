"""Load sound: convert files and arrays to mono samples at the model's sampling rate.

A `SoundWarning` reports conversions (rate, channels). Invalid sound (only silence, NaN, a file
without sound) is an error, because a model would still make words of it.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qeff_proxy.arrays import Array, to_array
from qeff_proxy.common.messages import counted, type_named
from qeff_proxy.errors import UsageError
from qeff_proxy.families.ogg import is_cut_off

__all__ = ["SoundWarning", "load_sound"]

#: A sound with less amplitude than this (-80 dB of full scale) is silence.
SILENCE = 1e-4
#: With less than `QUIET` (-40 dB) it is very quiet; more than `LOUDEST` cannot be floating-point
#: samples.
QUIET, LOUDEST = 1e-2, 4.0
#: Seconds of the window that a recognizer analyzes; a shorter sound cannot be speech.
SHORTEST = 0.025
#: Rates of recordings, in Hz.
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000
#: An array of samples has at most this many channels; more rows than that are samples.
MAX_CHANNELS = 8
#: Samples of a file, over all channels: 9 hours at 16 kHz, 2 GiB. A small file can hold many more.
MOST_SAMPLES = 2**29
#: Frames that are read at a time.
_BLOCK = 2**20
#: The share of the frames in the header (for an MP3 an estimate) that the file must have.
_WHOLE = 0.98
_UNKNOWN_LENGTH = 2**31 - 1


class SoundWarning(UserWarning):
    """The sound was converted for the model, or is suspicious."""


def load_sound(sound: Any, rate: int, sampling_rate: int | None = None) -> Array:
    """Load one sound for a model.

    Args:
        sound: A path to a file that libsndfile reads (WAV, FLAC, OGG, MP3 …), an array of samples
            (``[samples]``, or with channels on either axis; integers of 16 or 32 bits are scaled
            to ±1), or a mapping with ``array`` (or ``path``) and ``sampling_rate``.
        rate: The rate to return, in Hz.
        sampling_rate: The rate of an array; ``None`` means ``rate``.

    Returns:
        ``[samples]`` float32.

    Raises:
        UsageError: It is no sound, is empty or silent, or has NaN or infinite samples.
    """
    if isinstance(sound, Mapping):
        sampling_rate = sound.get("sampling_rate", sampling_rate)
        sound = sound["array"] if sound.get("array") is not None else sound.get("path")
    if isinstance(sound, str | Path):
        name = str(sound)
        samples, own_rate = _read(Path(sound).expanduser())
    else:
        name = "the array"
        samples = _samples_of(sound)
        own_rate = rate if sampling_rate is None else sampling_rate
    _check_rate(own_rate, name)
    mono = _mono(samples, name)
    if mono.size == 0:
        raise UsageError(f"{name} holds no samples", "Give a sound that is not empty.")
    if not np.isfinite(mono).all():
        raise UsageError(f"{name} has samples that are NaN or infinite", "Repair the sound.")
    _check_loudness(mono, name)
    if mono.size < SHORTEST * own_rate:
        raise UsageError(
            f"{name} is too short to be speech: {counted(mono.size, 'sample')} at {own_rate} Hz",
            "Give a longer sound.",
        )
    return _resampled(mono, own_rate, rate, name)


def _check_loudness(samples: Array, name: str) -> None:
    least, most = float(samples.min()), float(samples.max())
    swing = (most - least) / 2  # a constant is silence, however large
    if swing < SILENCE:
        raise UsageError(
            f"{name} holds only silence (it swings by {swing:.2g} of full scale)",
            "Check the recording; a recognizer would make words of nothing.",
        )
    if max(most, -least) > LOUDEST:
        raise UsageError(
            f"{name} has samples as large as {max(most, -least):.3g}, and full scale is 1",
            "Divide them by full scale: 32768 for samples of 16 bits.",
        )
    if swing < QUIET:
        warnings.warn(
            f"{name} is very quiet (it swings by {swing:.2g} of full scale): words may be misheard",
            SoundWarning,
            4,
        )


def _read(path: Path) -> tuple[Array, int]:
    soundfile = _package("soundfile", "sound files are read")
    if not path.is_file():
        raise UsageError(f"there is no sound file {str(path)!r}", "Check the path.")
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty", "Record or copy it again.")
    try:
        with soundfile.SoundFile(path) as file:
            samples = _read_blocks(file, path)
            promised, rate, notes = file.frames, file.samplerate, file.extra_info
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UsageError(
            f"{path} is no sound file that can be read ({error})",
            "WAV, FLAC, OGG and MP3 are; take the sound out of a video or another format with "
            "ffmpeg -i FILE -ac 1 -ar 16000 sound.wav",
        ) from error
    if len(samples) < promised * _WHOLE or _lacks_data(notes) or is_cut_off(path):
        warnings.warn(
            f"{path} ends too early: it may have been cut off, and words be missing",
            SoundWarning,
            4,
        )
    return samples, int(rate)


def _read_blocks(file: Any, path: Path) -> Array:
    """``[samples, channels]`` of an open file, whose header may promise more than there is.

    Raises:
        UsageError: There are more than `MOST_SAMPLES`.
    """
    blocks = [np.empty((0, file.channels), np.float32)]
    count = 0
    while (block := file.read(_BLOCK, dtype="float32", always_2d=True)).size:
        blocks.append(block)
        count += block.size
        if count > MOST_SAMPLES:
            raise UsageError(
                f"{path} holds more than {MOST_SAMPLES:,} samples", "Cut it into shorter sounds."
            )
    return np.concatenate(blocks)


def _lacks_data(notes: str) -> bool:
    """Whether a WAV file holds less data than its header says, from libsndfile's log."""
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", notes, flags=re.MULTILINE)
    # A file that was written to a pipe has the largest possible length in its header.
    return found is not None and int(found[2]) < int(found[1]) < _UNKNOWN_LENGTH


def _samples_of(sound: Any) -> Array:
    try:
        array = to_array(sound) if isinstance(sound, torch.Tensor) else np.asarray(sound)
    except (TypeError, ValueError) as error:
        raise _no_sound(sound) from error
    if array.dtype.kind not in "biufc":
        raise _no_sound(sound)
    if array.dtype.kind == "i" and array.dtype.itemsize in (2, 4):
        return array.astype(np.float32) / float(-np.iinfo(array.dtype).min)
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        raise UsageError(
            f"an array of {array.dtype} with shape {list(array.shape)} is no sound",
            "Give [samples] or [samples, channels], floating or 16 or 32 bit integers.",
        )
    return array.astype(np.float32)


def _no_sound(sound: Any) -> UsageError:
    return UsageError(f"{type_named(sound)} is no sound", "Give a path or samples.")


def _check_rate(rate: Any, name: str) -> None:
    if not isinstance(rate, int | np.integer) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UsageError(
            f"the sampling rate of {name} is {rate!r}", "It is a whole number of Hz, such as 16000."
        )


def _mono(samples: Array, name: str) -> Array:
    """``[samples]``: the mean of the channels, which are the shorter axis."""
    if samples.ndim == 1:
        return samples
    axis = 1 if samples.shape[1] <= MAX_CHANNELS else 0
    channels = samples.shape[axis]
    if channels > MAX_CHANNELS:
        raise UsageError(
            f"{name} has shape {list(samples.shape)}", "Give sounds of several lengths as a list."
        )
    if channels > 1:
        warnings.warn(f"{name} has {channels} channels; their mean is used", SoundWarning, 3)
    return np.ascontiguousarray(samples.mean(axis=axis), dtype=np.float32)


def _resampled(samples: Array, own_rate: int, rate: int, name: str) -> Array:
    if own_rate == rate:
        return samples
    soxr = _package("soxr", "sounds are resampled")
    lost = f"; above {own_rate // 2} Hz it holds nothing, so words may be misheard"
    warnings.warn(
        f"{name} is resampled from {own_rate} to {rate} Hz, which the model needs"
        f"{lost if own_rate < rate else ''}",
        SoundWarning,
        3,
    )
    result: Array = soxr.resample(samples, own_rate, rate, quality="HQ")
    return result.astype(np.float32, copy=False)


def _package(name: str, what: str) -> Any:
    """A package that comes with the plugins of sounds."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{what} by the package {name}, which cannot be imported ({error})",
            "Run pip install 'qeff-proxy[audio]', or give samples at the model's own rate.",
        ) from error
