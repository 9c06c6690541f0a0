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

_HINT = "Resize the image, or export with -C image_size=HEIGHTxWIDTH (in pixels) for such images."
_SHOWN = 8  # numbers of a tensor that a message shows


@dataclass(frozen=True)
class Geometry:
    """The only geometry of an image that a vision part is made for; it runs once for each image.

    Attributes:
        tensors: What the processor's outputs besides the pixels say of one image, as nested lists.
        rows: The feature rows of an image.
        blanks: Images of zeros are padding.
    """

    tensors: Mapping[str, Any]
    rows: int
    blanks: bool = False

    def images(self, spec: TensorSpec, tensors: Mapping[str, Array]) -> list[Array]:
        """The pixels of each image.

        Args:
            spec: The vision part's input.
            tensors: A processor's output.

        Raises:
            UsageError: An image has another geometry, or a tensor is missing.
        """
        shape = tuple(int(size) for size in spec.shape)
        leading = next(i for i, size in enumerate((*shape, 0)) if size != 1)
        inner = shape[max(leading, 1) :]
        pixels = np.asarray(tensors[spec.name], numpy_dtype(spec.dtype))
        if pixels.shape[pixels.ndim - len(inner) :] != inner:
            raise UsageError(
                f"{spec.name} has shape {list(pixels.shape)}, and the export is made for images of "
                f"{list(shape)}",
                _HINT,
            )
        count = pixels.size // int(np.prod(shape))
        for name, wanted in self.tensors.items():
            count = self._check(name, np.array(wanted), tensors, spec.name)
        if count * int(np.prod(shape)) != pixels.size:
            raise UsageError(
                f"{spec.name} has shape {list(pixels.shape)}, which is not that of {count} images "
                f"of {list(shape)}",
                "Let the checkpoint's processor create the tensors.",
            )
        images = [np.ascontiguousarray(image) for image in pixels.reshape(count, *shape)]
        return [image for image in images if not self.blanks or image.any()]

    def _check(
        self, name: str, wanted: Array, tensors: Mapping[str, Array], pixels: str
    ) -> int:
        """The number of images that a tensor describes, all with the wanted geometry."""
        if name not in tensors:
            raise UsageError(
                f"images need the tensor {name!r}, which is missing",
                "Let the checkpoint's processor create the tensors.",
            )
        given = np.asarray(tensors[name])
        rest = given.size % wanted.size
        described = given.reshape(-1) if rest else given.reshape(-1, wanted.size)
        blank = np.zeros(len(described), bool)
        if self.blanks and not rest:
            blank = ~np.asarray(tensors[pixels]).reshape(len(described), -1).any(axis=1)
        for index, image in enumerate(described):
            if rest or not (blank[index] or (image == wanted.reshape(-1)).all()):
                short = wanted.size <= _SHOWN and not rest
                said = f"{name} {image.tolist()}" if short else f"another {name}"
                made = f" for {wanted.reshape(-1).tolist()}" if short else " for one size of image"
                raise UsageError(
                    f"image {index + 1} has {said}, and the export is made{made}", _HINT
                )
        return len(described)
