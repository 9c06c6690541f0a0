"""Images for a vision part that is made for one geometry: split a batch's tensors into images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from qeff_proxy.arrays import Array, numpy_dtype
from qeff_proxy.errors import UsageError
from qeff_proxy.parts import TensorSpec

__all__ = ["Geometry"]

_HINTS = {
    "image": "Resize the image, or export with -C image_size=HEIGHTxWIDTH (in pixels) for such "
    "images.",
    "sound": "Cut or pad the sound, or export with -C audio_frames=N for sounds of N frames.",
}
_PROCESSOR = "Let the checkpoint's processor create the tensors."
_SHOWN = 8  # numbers of a tensor that a message shows


@dataclass(frozen=True)
class Geometry:
    """The only geometry of an image that a vision part is made for; it runs once for each image.

    Attributes:
        tensors: What the processor's outputs besides the pixels say of one image, as nested lists.
        rows: The feature rows of an image.
        blanks: Images of zeros are padding.
        padding: The one of ``tensors`` that marks the patches that are padding, and its value
            there.
        along: The axis of the pixels along which images are lined up.
        what: ``"image"`` or ``"sound"``.
    """

    tensors: Mapping[str, Any]
    rows: int
    blanks: bool = False
    padding: tuple[str, int] | None = None
    along: int = 0
    what: str = "image"

    def images(self, spec: TensorSpec, tensors: Mapping[str, Array]) -> list[Array]:
        """The pixels of each image.

        Args:
            spec: The vision part's input.
            tensors: A processor's output.

        Raises:
            UsageError: An image has another geometry, or a tensor is missing.
        """
        for name in self.tensors:
            if name not in tensors:
                raise UsageError(
                    f"{self.what}s need the tensor {name!r}, which is missing", _PROCESSOR
                )
        shape = tuple(int(size) for size in spec.shape)
        if self.padding is not None:
            tensors = _without_padding(spec.name, shape, tensors, *self.padding)
        pixels = np.asarray(tensors[spec.name], numpy_dtype(spec.dtype))
        if self.along and pixels.ndim == len(shape):
            count = max(1, pixels.shape[self.along] // shape[self.along])
            pixels = np.concatenate(np.array_split(pixels, count, axis=self.along))
        # Images are counted along the first axis, or the first two.
        inner = shape[2:] if shape[:2] == (1, 1) else shape[1:]
        if pixels.shape[pixels.ndim - len(inner) :] != inner:
            raise UsageError(
                f"{spec.name} has shape {list(pixels.shape)}, and the export is made for "
                f"{self.what}s of {list(shape)}",
                _HINTS[self.what],
            )
        real = _real(pixels.reshape(-1, *inner)) if self.blanks else None
        counts = {
            _check(name, np.array(wanted), np.asarray(tensors[name]), real, self.what)
            for name, wanted in self.tensors.items()
        }
        count = counts.pop() if counts else pixels.size // int(np.prod(shape))
        if counts or count * int(np.prod(shape)) != pixels.size:
            raise UsageError(
                f"{spec.name} has shape {list(pixels.shape)}, which is not that of {count} "
                f"{self.what}s of {list(shape)}",
                _PROCESSOR,
            )
        images = pixels.reshape(count, *shape)
        return [np.ascontiguousarray(image) for image in (images if real is None else images[real])]


def _real(images: Array) -> Array:
    """Which images are no padding: ``[images]`` bool."""
    return np.array([image.any() for image in images], bool)


def _check(name: str, wanted: Array, given: Array, real: Array | None, what: str) -> int:
    """The number of images that a tensor describes, all of which have the wanted geometry."""
    fits = given.size % wanted.size == 0
    described = given.reshape(-1, wanted.size) if fits else given.reshape(len(given), -1)
    short = wanted.size <= _SHOWN and fits
    for index, image in enumerate(described):
        blank = real is not None and fits and len(real) == len(described) and not real[index]
        if not fits or not (blank or (image == wanted.reshape(-1)).all()):
            said = f"{name} {image.tolist()}" if short else f"another {name}"
            made = f"{wanted.reshape(-1).tolist()}" if short else f"{what}s of one size"
            raise UsageError(
                f"{what} {index + 1} has {said}, and the export is made for {made}", _HINTS[what]
            )
    return len(described)


def _without_padding(
    pixels: str, shape: tuple[int, ...], tensors: Mapping[str, Array], marks: str, value: int
) -> dict[str, Array]:
    """The tensors with only those patches of each image that are no padding."""
    given, marking = np.asarray(tensors[pixels]), np.asarray(tensors[marks])
    if given.shape[:2] != marking.shape[:2]:
        raise UsageError(f"{pixels} and {marks} are not of the same patches", _PROCESSOR)
    kept = marking != value
    kept = kept.any(axis=-1) if kept.ndim == 3 else kept
    for index, count in enumerate(kept.sum(axis=1)):
        if count != shape[1]:
            raise UsageError(
                f"image {index + 1} has {count} patches, and the export is made for {shape[1]}",
                _HINTS["image"],
            )
    stripped = {
        name: array[kept].reshape(len(kept), shape[1], *array.shape[2:])
        for name, array in ((pixels, given), (marks, marking))
    }
    return {**tensors, **stripped}
