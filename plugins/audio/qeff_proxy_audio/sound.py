"""Sound in: files and arrays become mono samples at the rate a model was trained on.

What is changed on the way (rate, channels) is said in a `SoundWarning`; what cannot be right
(nothing but silence, NaN, a file that holds no sound) is an error, because a recognizer would make
words of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from qeff_proxy.arrays import Array, to_array
from qeff_proxy.errors import UsageError

__all__ = ["SoundWarning", "load_sound"]

#: Peaks below this (-80 dB of full scale) are silence.
SILENCE = 1e-4
#: An array of samples has at most this many channels; more rows than that are samples.
MAX_CHANNELS = 8


class SoundWarning(UserWarning):
    """The sound was changed to fit the model."""


def load_sound(sound: Any, rate: int, sampling_rate: int | None = None) -> Array:
    """One sound as a model takes it.

    Args:
        sound: A path to a file that libsndfile reads (WAV, FLAC, OGG, MP3 …), an array of samples
            (``[samples]``, or with channels on either axis; integers of 16 or 32 bits are scaled
            to ±1), or a mapping with ``array`` (or ``path``) and ``sampling_rate``.
        rate: The rate to give, in Hz.
        sampling_rate: The rate of an array; ``None`` means ``rate``.

    Returns:
        ``[samples]`` float32.

    Raises:
        UsageError: It is no sound, is empty or silent, or has samples that are no numbers.
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
    peak = float(np.abs(mono).max())
    if peak < SILENCE:
        raise UsageError(
            f"{name} holds only silence (its peak is {peak:.2g} of full scale)",
            "Check the recording; a recognizer would make words of nothing.",
        )
    return _resampled(mono, own_rate, rate, name)


def _read(path: Path) -> tuple[Array, int]:
    import soundfile

    if not path.is_file():
        raise UsageError(f"there is no sound file {str(path)!r}", "Check the path.")
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty", "Record or copy it again.")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UsageError(
            f"{path} is no sound file that can be read ({error})",
            "WAV, FLAC, OGG and MP3 are; take the sound out of a video or another format with "
            "ffmpeg -i FILE -ac 1 -ar 16000 sound.wav",
        ) from error
    return samples, int(rate)


def _samples_of(sound: Any) -> Array:
    try:
        array = to_array(sound) if hasattr(sound, "detach") else np.asarray(sound)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{type(sound).__name__} is no sound", "Give a path or samples."
        ) from error
    if array.dtype.kind == "i" and array.dtype.itemsize in (2, 4):
        return array.astype(np.float32) / float(-np.iinfo(array.dtype).min)
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        raise UsageError(
            f"an array of {array.dtype} with shape {list(array.shape)} is no sound",
            "Give [samples] or [samples, channels], floating or 16 or 32 bit integers.",
        )
    return array.astype(np.float32)


def _check_rate(rate: Any, name: str) -> None:
    if not isinstance(rate, int | np.integer) or rate < 1:
        raise UsageError(f"the sampling rate of {name} is {rate!r}", "It is a number of Hz.")


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
    import soxr  # type: ignore[import-untyped]

    warnings.warn(
        f"{name} is resampled from {own_rate} to {rate} Hz, which the model needs", SoundWarning, 3
    )
    result: Array = soxr.resample(samples, own_rate, rate, quality="HQ")
    if result.size == 0:
        raise UsageError(f"{name} is too short to be resampled", "Give a longer sound.")
    return result.astype(np.float32, copy=False)
