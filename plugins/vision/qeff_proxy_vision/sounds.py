"""The tower of sounds: what its part takes and gives, found by running the model on noise.

Three forms, the first that equals the model on sounds of several lengths: any number of frames; a
number of frames that is fixed, and masks that say which of them are sound; or one sound of one
length at a time, of which a graph holds all that the tower calculates from lengths and masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import UnsupportedModelError, UsageError
from qeff_proxy.parts import Part, TensorSpec
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qeff_proxy_vision.fixed_image import FixedImagePart, count_operations, rows_of
from qeff_proxy_vision.geometry import Geometry
from qeff_proxy_vision.language import HINT
from qeff_proxy_vision.one_image import features_owner

__all__ = ["COUNTED", "SOUND_FEATURES", "SoundTower", "find_tower", "sound_getter", "sound_token"]

#: The outputs of the part: rows of features, and which of them count, where not all do.
SOUND_FEATURES, COUNTED = "audio_features", "audio_rows"
GETTER = "get_audio_features"
_TOKENS = ("audio_token_id", "audio_token_index")
_SOUNDS = ("input_features", "input_values")
_MASKS = ("input_features_mask", "feature_attention_mask", "input_values_mask", "padding_mask")
#: Configs' names for the bins of a spectrum.
_BINS = ("num_mel_bins", "input_feat_size", "input_dim", "feature_size", "n_mels", "input_size")
#: Frames, or samples, of the sounds that a tower is tried on first, and of its graph, where it
#: takes one number of them and the config does not say it: 30 s.
_TRIED = {"input_features": 240, "input_values": 32_000}
_FIXED = {"input_features": 3_000, "input_values": 480_000}
_CLOSE = 1e-4  # of the largest feature

#: Makes a model's features of its sounds: ``get(model, **tensors)``.
Getter = Callable[..., Any]


def sound_token(config: Any) -> int | None:
    """The token that stands for a feature of a sound; ``None`` where the config names none."""
    return next((t for name in _TOKENS if (t := getattr(config, name, None)) is not None), None)


def sound_getter(model: PreTrainedModel) -> Getter | None:
    """What makes features of sounds: the model's ``get_audio_features``; ``None`` without one."""
    owner = features_owner(model, GETTER)
    method = getattr(owner, GETTER, None)
    if method is None or getattr(owner, "audio_tower", True) is None:
        return None

    def get(module: Any, **tensors: torch.Tensor) -> Any:
        return getattr(module, GETTER)(**tensors, return_dict=True)

    vars(get)["__signature__"] = inspect.signature(method)
    return get


@dataclass(frozen=True)
class _Form:
    """The tensors of sounds.

    Attributes:
        name: Of the tensor of samples, or of spectra.
        bins: Of a spectrum; 0 for samples.
        last: Whether the bins are the last axis, after the frames.
        frames: Frames, or samples, of a sound.
        masks: Names of the tensors that say which of them are sound.
        dtype: Of the masks.
        model_dtype: Of the sounds.
        usual: Whether the config says the number of frames.
    """

    name: str
    bins: int
    last: bool
    frames: int
    masks: tuple[str, ...]
    dtype: torch.dtype
    model_dtype: torch.dtype
    usual: bool

    def shape(self, sounds: int | str, frames: int | str) -> tuple[int | str, ...]:
        """Of the sounds."""
        if not self.bins:
            return sounds, frames
        return (sounds, frames, self.bins) if self.last else (sounds, self.bins, frames)

    def tensors(self, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """Sounds of noise, padded with zeros."""
        shape = [int(size) for size in self.shape(len(lengths), self.frames)]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(self.frames) < torch.tensor(lengths)[:, None]
        if self.bins:
            noise = noise * (mask[..., None] if self.last else mask[:, None])
        else:
            noise = noise * mask
        masks = {name: mask.to(self.dtype) for name in self.masks}
        return {self.name: noise.to(self.model_dtype), **masks}

    def lengths(self, count: int) -> list[int]:
        """Different lengths where there is a mask, else the only one; the first is the longest."""
        if not self.masks:
            return [self.frames] * count
        return [self.frames - (index * 2 + 1) * self.frames // 9 for index in range(count)]


class SoundPart(FixedImagePart):
    """Sounds to feature rows; with a geometry one sound, else any number and their masks."""

    #: Elements of a mask for each row of features.
    per_row = 1

    def forward(self, **sounds: torch.Tensor) -> dict[str, torch.Tensor]:
        """``audio_features [rows, hidden]``; ``audio_rows [rows]``, 1 for those that count."""
        if self.geometry:
            return super().forward(**sounds)
        with _Unselected() as selection:
            outputs = self.get(self.model, **sounds)
        rows = rows_of(_pooled(outputs))
        mask = selection.mask if selection.mask is not None else outputs.get("attention_mask")
        if mask is None:
            return {SOUND_FEATURES: rows}
        if self.per_row > 1:
            mask = mask.reshape(-1, self.per_row).all(dim=-1)
        # Of the features' dtype, which every compiler takes.
        return {SOUND_FEATURES: rows, COUNTED: mask.reshape(-1).to(rows.dtype)}


class _Unselected(TorchFunctionMode):
    """Keeps the rows that a mask leaves out, so that the shape of a result is that of the inputs.

    Attributes:
        mask: The last such mask; ``None`` where there was none.
    """

    mask: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            of, mask = args
            if mask.dtype == torch.bool and mask.dim() == 2 and of.dim() == 3:
                self.mask = mask
                return of.flatten(0, 1)
        return func(*args, **(kwargs or {}))


def _pooled(outputs: Any) -> Any:
    pooled = outputs.get("pooler_output")
    return outputs["last_hidden_state"] if pooled is None else pooled


@dataclass(frozen=True)
class SoundTower:
    """The part of sounds, and two sounds of noise to try it on.

    Attributes:
        part: The part.
        geometry: Of the sounds, where the part is made for one length.
        counted: The tensor that says which rows count: an output, or the processor's.
        sounds: The tensors of two sounds, as the model takes them.
        features: The rows for them that count, ``[rows, hidden]``.
        counts: How many of them belong to each.
        frames: Of each sound, padding included.
        usual: Whether a tower's config says that number.
        pads: Fewer frames may be padded to that number: masks leave no trace of the padding.
    """

    part: Part
    geometry: Geometry | None
    counted: str | None
    sounds: Mapping[str, torch.Tensor]
    features: torch.Tensor
    counts: Sequence[int]
    frames: int
    usual: bool
    pads: bool


def find_tower(
    model: PreTrainedModel, get: Getter, decoder_path: str, width: int, frames: Any
) -> SoundTower:
    """The tower of sounds.

    Args:
        model: The model.
        get: Makes its features.
        decoder_path: Where its language model is.
        width: Of the language model.
        frames: The option ``audio_frames``: of each sound, where their number is fixed.

    Raises:
        UnsupportedModelError: No form of sounds is understood; says why.
        UsageError: The option is no number.
    """
    if frames is not None and not str(frames).isdecimal():
        raise UsageError(f"audio_frames is {frames!r}", "Give a number of frames of a spectrum.")
    owner = features_owner(model, GETTER)
    text_path = decoder_path.removeprefix("model.") if owner is not model else decoder_path
    problems: list[str] = []
    for form in _forms(model, get, None if frames is None else int(frames)):
        try:
            with torch.no_grad():
                tower = _tower(owner, get, text_path, form, width, fixed=frames is not None)
        except Exception as error:  # noqa: BLE001 (a model's code, on a form that may be wrong)
            shape = list(form.shape(2, form.frames))
            problems.append(f"{form.name} {shape}: {type(error).__name__}: {first_line(error)}")
            continue
        if tower is None:
            problems.append("its features depend on more than the sound, such as on random numbers")
        elif tower.features.shape[-1] != width:
            problems.append(f"features are {tower.features.shape[-1]} wide, not {width}")
        else:
            return _with_rows(model, tower, form)
    raise UnsupportedModelError(
        f"no sounds are found that {type(model).__name__} makes features of ({problems[0]})",
        "If its tower takes one number of frames, give it: -C audio_frames=N.",
    )


def _forms(model: PreTrainedModel, get: Getter, frames: int | None) -> Iterator[_Form]:
    takes = inspect.signature(get).parameters
    name = next((one for one in _SOUNDS if one in takes), None)
    masks = tuple(one for one in _MASKS if one in takes)
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(needed) - {name, *masks, "model", "args"})
    if name is None or unknown:
        raise UnsupportedModelError(
            f"the sounds of {type(model).__name__} come with {', '.join(unknown) or 'other names'},"
            " which the image-text plugin does not know",
            HINT,
        )
    parts = [getattr(model.config, one) for one in getattr(model.config, "sub_configs", {})]
    parts = [one for one in parts if one is not model.config.get_text_config()]
    sizes = (getattr(part, one, None) for part in parts for one in _BINS)
    bins = dict.fromkeys([*(size for size in sizes if isinstance(size, int)), 128, 80])
    positions = (getattr(part, "max_source_positions", None) for part in parts)
    window = next((2 * one for one in positions if one), None)
    numbers = (_TRIED[name], window, _FIXED[name]) if frames is None else (frames,)
    for number in dict.fromkeys(n for n in numbers if n is not None):
        layouts = [(size, last) for size in bins for last in (False, True)]
        for size, last in layouts if name == "input_features" else [(0, False)]:
            for dtype in (torch.int64, torch.bool) if masks else (torch.int64,):
                yield _Form(name, size, last, number, masks, dtype, model.dtype, number == window)


def _tower(
    owner: Any, get: Getter, text_path: str, form: _Form, width: int, *, fixed: bool
) -> SoundTower | None:
    """The tower for a form; ``None`` where no part equals the model."""
    tried = not fixed and form.frames == _TRIED[form.name]
    part = SoundPart(owner, text_path, {}, get=get, features=SOUND_FEATURES)
    sounds = form.tensors(form.lengths(2))
    made = get(part.model, **sounds)
    marks = made.get("attention_mask")
    if marks is not None and marks.dtype != torch.bool:
        raise TypeError("the mask of its rows is no mask of booleans")  # of another dtype it is
    expected = _counted(made)
    if expected.shape[-1] != width:
        return _described(part, form, None, sounds, expected, free=False)
    found, count = _tried(part, sounds)
    if found is not None and _close(found, expected):
        more = form.tensors(form.lengths(3)[::-1])
        if _tried(part, more)[1] == count:
            free = tried and _is_free(part, form, count)
            if free or not tried:
                return _described(part, form, None, sounds, expected, free=free)
    if tried:
        raise ValueError("the number of frames is fixed")  # another form has a usual number
    one = form.tensors([form.frames])
    constants = {name: one[name] for name in form.masks}
    part = SoundPart(owner, text_path, constants, get=get, features=SOUND_FEATURES)
    rows = _counted(get(part.model, **one))
    if not _close(part(**{form.name: one[form.name]})[SOUND_FEATURES], rows):
        return None
    geometry = Geometry({n: t.tolist() for n, t in constants.items()}, len(rows), what="sound")
    two = form.tensors([form.frames] * 2)
    both = [part(**{form.name: each[None]})[SOUND_FEATURES] for each in two[form.name]]
    return _described(part, form, geometry, two, torch.cat(both), free=False)


def _tried(part: SoundPart, sounds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, int]:
    """The rows that count, ``None`` where a part cannot be run; and the operations of the run."""
    part.per_row = 1
    try:
        outputs, count = count_operations(part, sounds)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return None, -1
    rows, mask = outputs[SOUND_FEATURES], outputs.get(COUNTED)
    if mask is None:
        return rows, count
    if len(mask) % len(rows):
        return None, -1
    part.per_row = len(mask) // len(rows)
    return rows[mask.reshape(len(rows), -1).bool().all(dim=-1)], count


def _is_free(part: SoundPart, form: _Form, count: int) -> bool:
    """Whether a tower takes any number of frames, by the same operations."""
    per_row = part.per_row
    for more in (1, 2, 7):
        other = replace(form, frames=form.frames + more)
        if _tried(part, other.tensors(other.lengths(2)))[1] != count or part.per_row != per_row:
            return False
    return True


def _counted(outputs: Any) -> torch.Tensor:
    """A model's feature rows, without those that its mask of rows leaves out."""
    pooled, mask = _pooled(outputs), outputs.get("attention_mask")
    return rows_of(pooled if mask is None else pooled[mask.bool()])


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    off = (found - expected).abs().max()
    return bool(off <= _CLOSE * expected.abs().max().clamp(min=1e-6))


def _described(
    module: SoundPart,
    form: _Form,
    geometry: Geometry | None,
    sounds: Mapping[str, torch.Tensor],
    features: torch.Tensor,
    *,
    free: bool,
) -> SoundTower:
    number: int | str = 1 if geometry is not None else "sounds"
    frames: int | str = "frames" if free else form.frames
    dtype = dtype_name(form.model_dtype)
    inputs = [TensorSpec(form.name, dtype, form.shape(number, frames))]
    rows: int | str = "rows"
    if geometry is not None:
        rows = geometry.rows
    else:
        inputs += [TensorSpec(n, dtype_name(form.dtype), (number, frames)) for n in form.masks]
    outputs = [TensorSpec(SOUND_FEATURES, dtype, (rows, int(features.shape[-1])))]
    counts = [len(features) // 2] * 2
    counted = None
    if geometry is None:
        made = module(**sounds)
        if COUNTED in made:
            counted = COUNTED
            outputs.append(TensorSpec(COUNTED, dtype, (rows,)))
            counts = made[COUNTED].reshape(2, -1).bool().sum(dim=-1).tolist()
    tried = {"sounds": 2, **({"frames": form.frames} if free else {})}
    checks = tuple({"sounds": n, "frames": form.frames + m} for n, m in ((1, 3), (3, 17)))
    part = Part(
        "audio",
        module,
        tuple(inputs),
        tuple(outputs),
        "audio",
        trace_sizes={} if geometry is not None else tried,
        check_sizes=() if geometry is not None else checks,
    )
    pads = geometry is None and not free and _pads(module, form)
    return SoundTower(
        part, geometry, counted, sounds, features, counts, form.frames, form.usual, pads
    )


def _pads(module: SoundPart, form: _Form) -> bool:
    """Whether a sound gives the same rows without its padding."""
    if not form.masks:
        return False
    length = form.frames * 2 // 3
    padded = form.tensors([length])
    axis = dict.fromkeys(padded, 1) | {form.name: 2 if form.bins and not form.last else 1}
    short = {name: value.narrow(axis[name], 0, length) for name, value in padded.items()}
    try:
        with torch.no_grad():
            found, expected = (_counted(module.get(module.model, **s)) for s in (short, padded))
    except (RuntimeError, TypeError, ValueError, LookupError):
        return False  # it takes one number of frames only
    return _close(found, expected)


def _with_rows(model: PreTrainedModel, tower: SoundTower, form: _Form) -> SoundTower:
    """The tower with the mask of rows that a model takes besides (``input_features_mask``)."""
    takes = inspect.signature(model.forward).parameters
    name = next((one for one in _MASKS if one in takes and one not in form.masks), None)
    if name is None or tower.counted is not None or tower.geometry is not None:
        return tower
    rows = len(tower.features) // 2
    counts = [rows, max(1, rows * 2 // 3)]
    mask = torch.arange(rows) < torch.tensor(counts)[:, None]
    kept = tower.features.reshape(2, rows, -1)[mask]
    return replace(
        tower, counted=name, sounds={**tower.sounds, name: mask}, features=kept, counts=counts
    )
