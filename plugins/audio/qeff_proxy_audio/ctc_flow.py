"""The ``ctc`` flow: each sound runs alone, long ones in windows.

A sound is never padded: the model's group normalization makes zeros at the end change the whole
transcript. A long sound is run in overlapping windows; the frames in the middle of each window are
kept, and these join without a gap. Features, of models that do not take samples, run in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from qeff_proxy.arrays import Array, numpy_dtype, to_array, to_tensor
from qeff_proxy.artifact.manifest_schema import Export
from qeff_proxy.errors import BackendError, CutError, UsageError
from qeff_proxy.flows.causal_engine import Recorder
from qeff_proxy.flows.equality import check_equal, parts_must_run
from qeff_proxy.flows.flow import CutReport, Job
from qeff_proxy.parts import Proxy
from qeff_proxy.request import Request
from qeff_proxy.session.part_like import PartLike
from qeff_proxy.session.session import Session
from qeff_proxy.session.torch_session import TorchSession
from qeff_proxy.sites import Absent, Site

from qeff_proxy_audio.sound import EXAMPLE, load_sound

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CHUNK_SECONDS", "STRIDE_SECONDS", "CtcFlow", "Window", "frames_of", "windows_of"]

#: Sounds longer than this run in windows of this many seconds …
CHUNK_SECONDS = 30.0
#: … which overlap by this much at each end.
STRIDE_SECONDS = 5.0

_RATE = 16_000
_STEPS = 97  # of the features used to verify a cut
#: ``(first sample, one past the last, first frame that is kept, one past the last)``
Window = tuple[int, int, int, int]
#: A window of sound ``[1, samples]`` or of features ``[1, steps, width]``, and the frames of it
#: that are kept; ``None`` for all behind the first.
_Piece = tuple[Array, int, int | None]


class CtcFlow:
    """A single pass per window."""

    def verify(
        self, model: PreTrainedModel, proxy: Proxy, sites: Mapping[str, Site | Absent]
    ) -> CutReport:
        """Compare the logits of the parts with the model's, on noise.

        Raises:
            CutError: They differ, or the parts cannot be run.
        """
        settings = proxy.settings
        _, _, *width = proxy.parts[0].inputs[0].shape
        samples = _STEPS
        if not width:
            samples = settings["shortest"] + 20 * settings["samples_per_frame"] + 7
        shape = (2, samples, *map(int, width))
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            expected = to_array(model(to_tensor(values).to(model.dtype)).logits.float())
        sessions = {part.name: TorchSession(part) for part in proxy.parts}
        with parts_must_run(model, sites):
            actual = _run_parts(proxy.parts, sessions, values, None, 0)
        if not width and frames_of(samples, settings) != expected.shape[1]:
            raise CutError(
                f"{samples} samples give {expected.shape[1]} frames, and not the "
                f"{frames_of(samples, settings)} that follow from the convolutions of its config",
                "Long sounds could not be joined; the plugin does not know this architecture.",
            )
        return check_equal(model, sites, expected, actual, output="logit")

    def example_request(
        self,
        export: Export,
        processor: Any,
        proxy: Callable[[], Proxy],  # noqa: ARG002 (part of the protocol)
    ) -> Request:
        """A recording of speech; without a processor its samples, or noise as features."""
        (sound, *_) = export.parts[0].inputs
        if processor is None and len(sound.shape) > 2:
            shape = (1, _STEPS, int(sound.shape[2]))
            noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            return Request(inputs={sound.name: noise})
        if processor is None:
            samples = load_sound(EXAMPLE, _RATE)
            return Request(inputs={"input_values": samples[None]})
        return Request(audio=(EXAMPLE,))

    def run(self, job: Job) -> dict[str, Any]:
        """Recognize.

        Returns:
            ``predicted_ids``, for each sound an int64 array with a token id per frame, and
            ``logits``, ``[frames, vocabulary]`` float32 each.

        Raises:
            UsageError: A sound is too short, or the export is a stub.
        """
        if job.export.kind == "stub":
            raise UsageError(
                "a stub's outputs mean nothing, so no transcript can be had from it",
                "Export with proxy='split' to transcribe.",
            )
        logits = []
        step = 0
        for windows in _sounds(job):
            pieces = []
            for window, first, last in windows:
                frames = _run_parts(job.export.parts, job.sessions, window, job.recorder, step)
                if last is not None and frames.shape[1] < last:
                    raise BackendError(
                        f"{window.shape[1]} samples gave {frames.shape[1]} frames, not {last}",
                        "Export the checkpoint again.",
                    )
                pieces.append(frames[0, first:last])
                step += 1
            logits.append(np.concatenate(pieces))
        return {"predicted_ids": [sound.argmax(axis=-1) for sound in logits], "logits": logits}

    def amount(self, job: Job) -> tuple[float, str]:
        """The seconds of all sounds together, or the steps of their features."""
        length = float(sum(int(n) for n in job.tensors["lengths"]))
        if "input_features" in job.tensors:
            return length, "steps of features"
        return length / _RATE, "seconds of sound"

    def run_model(self, model: PreTrainedModel, job: Job) -> object:
        """Run the uncut model on the same windows."""
        return [
            model(to_tensor(window).to(model.dtype)).logits
            for windows in _sounds(job)
            for window, _, _ in windows
        ]


def _sounds(job: Job) -> list[list[_Piece]]:
    """The windows of each sound, and which frames of each are kept.

    Raises:
        UsageError: A sound is too short, or the settings keep no frame of a window.
    """
    settings = job.export.settings
    name = job.export.parts[0].inputs[0].name
    if name not in job.tensors:
        raise UsageError(
            f"the model takes {name}, not {', '.join(set(job.tensors) - {'lengths'})}",
            "Pass what the checkpoint's own processor makes of a sound.",
        )
    values = to_array(job.tensors[name].float())
    if values.ndim > 2:
        if job.settings.get("chunk_length_s") or job.settings.get("stride_length_s"):
            raise UsageError(
                "a model of features runs each sound in one piece", "Leave out chunk_length_s."
            )
        lengths = [int(length) for length in job.tensors["lengths"]]
        return [[(values[i : i + 1, :length], 0, None)] for i, length in enumerate(lengths)]
    chunk = _seconds(job.settings, "chunk_length_s", CHUNK_SECONDS)
    stride = _seconds(job.settings, "stride_length_s", min(STRIDE_SECONDS, chunk / 6))
    sounds: list[list[_Piece]] = []
    for index, length in enumerate(int(length) for length in job.tensors["lengths"]):
        if length < settings["shortest"]:
            raise UsageError(
                f"sound {index} has {length} samples, and the model needs at least "
                f"{settings['shortest']}",
                "Give a longer sound.",
            )
        windows = windows_of(length, chunk, stride, settings)
        row = values[index : index + 1]
        sounds.append([(row[:, begin:end], first, last) for begin, end, first, last in windows])
    return sounds


def frames_of(length: int, settings: Mapping[str, int]) -> int:
    """How many frames a sound of ``length`` samples gives.

    Args:
        length: At least ``shortest``.
        settings: ``shortest`` and ``samples_per_step`` of the convolutions in front, and
            ``samples_per_frame``, which is larger where convolutions follow the encoder.
    """
    size = settings["samples_per_frame"]
    step = settings.get("samples_per_step", size)  # absent from older exports
    steps = (length - settings["shortest"]) // step + 1
    return -(-steps // (size // step))


def windows_of(
    length: int, chunk: float, stride: float, settings: Mapping[str, int]
) -> Iterator[Window]:
    """Where a sound is cut into windows.

    Args:
        length: Samples of the sound.
        chunk: Seconds of a window; shorter sounds are one window.
        stride: Seconds at each end of a window that are dropped.
        settings: Of the proxy; see `frames_of`.

    Raises:
        UsageError: The strides are as long as the window.
    """
    size = settings["samples_per_frame"]
    window, overlap = int(chunk * _RATE) // size, int(stride * _RATE) // size
    if window - 2 * overlap < 1:
        raise UsageError(
            f"stride_length_s={stride} twice leaves nothing of chunk_length_s={chunk}",
            "The chunk must be longer than twice the stride.",
        )
    last_frame = frames_of(length, settings)
    # Samples that the last frame needs beyond its own.
    reach = settings["shortest"] - settings.get("samples_per_step", size)
    begin = 0
    while True:
        end = begin + window
        first = overlap if begin else 0
        # A remainder too short for a window of its own is part of this one.
        if end + overlap >= last_frame:
            yield begin * size, length, first, last_frame - begin
            return
        yield begin * size, end * size + reach, first, window - overlap
        begin = end - 2 * overlap


def _seconds(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UsageError(f"{name} is {value!r}", "It is a number of seconds.")
    return float(value)


def _run_parts(
    parts: Sequence[PartLike],
    sessions: Mapping[str, Session],
    values: Array,
    recorder: Recorder | None,
    step: int,
) -> Array:
    """Run ``[batch, samples]`` or ``[batch, steps, width]`` through all parts to float32 logits."""
    sound = parts[0].inputs[0]
    known = {sound.name: values.astype(numpy_dtype(sound.dtype))}
    for part in parts:
        feeds = {spec.name: known[spec.name] for spec in part.inputs}
        outputs = sessions[part.name].run(feeds)
        if recorder is not None:
            recorder.step("prefill", step, part.name, feeds, outputs, past_length=0)
        known.update(outputs)
    return known["logits"].astype(np.float32)
