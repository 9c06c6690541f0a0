"""Convert users' images to PIL images in RGB, which every processor takes."""

from __future__ import annotations

import io
import os
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from qeff_proxy.common.messages import type_named
from qeff_proxy.errors import UsageError

__all__ = ["DRAWING", "MAX_PIXELS", "QUESTION", "open_image"]

#: A drawing in this package, a green triangle on white, and a question about it.
DRAWING = Path(__file__).parent / "checkpoints" / "drawings" / "drawing.png"
QUESTION = "What is this ?"

#: Larger images are refused before they are decoded: no processor uses more than a few million
#: pixels, and a small file can expand to billions.
MAX_PIXELS = 100_000_000
_MAX_BYTES = 200_000_000
#: Some of PIL's formats. Others are rare, and EPS starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_TIMEOUT = 30  # seconds to wait for a server


def open_image(source: Any) -> Image.Image:
    """Open one image.

    The camera's rotation (EXIF) is applied, transparency is laid on white, grey and palette images
    become RGB, and 16-bit samples become 8-bit.

    Args:
        source: A path, an ``http(s)`` URL, the bytes of an image file, a PIL image, or an array
            ``[height, width]``, ``[height, width, channels]`` or ``[channels, height, width]`` of
            1, 3 or 4 channels: uint8, uint16, or floats from 0 to 1.

    Raises:
        UsageError: It is no image, is damaged, has a side of less than two pixels, or has more
            than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        with _reading("the image"):  # it may not have been read yet
            return _to_rgb(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "the image")
    if isinstance(source, str | os.PathLike):
        return _open_named(os.fspath(source))
    if hasattr(source, "__array__"):
        return _to_rgb(_from_array(np.asarray(source)), "the array")
    raise UsageError(
        f"an image cannot be {type_named(source)}",
        "Pass a path, a URL, bytes, a PIL image or an array.",
    )


def _open_named(name: str) -> Image.Image:
    if urlsplit(name).scheme in {"http", "https"}:
        return _decode(io.BytesIO(_download(name)), name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no image file {name!r}", "Check the path.")
    with path.open("rb") as file:
        return _decode(file, name)


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 (http(s) only)
            data: bytes = answer.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{url} cannot be fetched ({error})", "Check the URL.") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"the image {url} has more than {_MAX_BYTES} bytes", "Shrink it.")
    return data


def _decode(file: Any, name: str) -> Image.Image:
    with _reading(name):
        with Image.open(file, formats=_FORMATS) as image:
            _check_size(image.width, image.height, name)
            image.verify()  # checksums, which loading ignores
        file.seek(0)
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            return _to_rgb(image, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn any error of an image's decoder into an error of one line."""
    try:
        with warnings.catch_warnings():
            # About sizes, which are checked here, and about metadata, which are not used.
            warnings.simplefilter("ignore")
            yield
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} has more than {MAX_PIXELS} pixels", "Shrink it.") from error
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{name} is no image that can be read", "Give a PNG, JPEG, WebP, GIF, BMP or TIFF file."
        ) from error
    except Exception as error:  # PIL's decoders raise different errors for damaged files
        reason = str(error) or type(error).__name__
        raise UsageError(f"{name} is damaged: {reason}", "Write the image anew.") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}", "Shrink it."
        )
    if min(width, height) < 2:
        raise UsageError(
            f"{name} has {width} x {height} pixels, which show nothing",
            "Give an image of at least 2 x 2 pixels.",
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.width, image.height, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        image = Image.fromarray(np.clip(samples // 257, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = _from_array(np.asarray(image))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and shape[2] not in {1, 3, 4} and shape[0] in {1, 3, 4}:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in {2, 3} or (array.ndim == 3 and array.shape[2] not in {3, 4}):
        raise UsageError(
            f"an array of shape {shape} is no image",
            "Give [height, width], or 1, 3 or 4 channels before or after them.",
        )
    if array.dtype == np.uint16:
        array = array // 257
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UsageError(
                "an array of floats goes beyond 0 to 1", "Scale it, or give uint8 from 0 to 255."
            )
        array = np.rint(array * 255)
    elif array.dtype != np.uint8 and (
        array.dtype.kind not in "iu" or array.size == 0 or array.min() < 0 or array.max() > 255
    ):
        raise UsageError(
            f"an array of {array.dtype} is no image", "Give uint8, uint16, or floats from 0 to 1."
        )
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
