"""Run a checkpoint's own processor without torchvision and TensorFlow.

Processors' code imports them only for a bilinear resize. If they are not installed, stand-ins
replace them while it is imported and while it runs (`without_image_libraries`), and PyTorch
resizes, by the same formula: a triangle filter, widened if the image shrinks. Pixels (0 to 1)
differ from TensorFlow 2.21's by at most 4e-5.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from qeff_proxy.errors import CheckpointError
from torch.nn import functional

from qeff_proxy_vision.remote import import_class, standing_in

__all__ = ["load_own_processor", "without_image_libraries"]


def load_own_processor(folder: Path, adapted: Callable[[type[Any]], type[Any]]) -> Any:
    """The processor of a checkpoint's code, which the caller trusts.

    Args:
        folder: The checkpoint.
        adapted: Its class to the one that is used.

    Returns:
        The processor, or ``None`` if the checkpoint's files name none.

    Raises:
        CheckpointError: Its code cannot be imported; names a missing package.
    """
    reference = _reference(folder / "preprocessor_config.json")
    if reference is None or not (folder / f"{reference.partition('.')[0]}.py").is_file():
        return None
    cls = adapted(import_class(folder, reference, _IMAGE_LIBRARIES))
    with standing_in(_IMAGE_LIBRARIES):
        return cls.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def _reference(path: Path) -> str | None:
    """``module.Class`` of the processor, from the file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["auto_map"]["AutoProcessor"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} names no processor ({type(error).__name__}: {error})",
            "Download the checkpoint again.",
        ) from error
    return str(found)


@contextmanager
def without_image_libraries() -> Iterator[None]:
    """Provide the stand-ins while the context is open.

    einops asks each imported library whether an array is its own, and caches those libraries: it
    looks them up before some are stand-ins.
    """
    if importlib.util.find_spec("einops") is not None:
        einops: Any = importlib.import_module("einops")
        einops.rearrange(np.zeros((1, 1), np.float32), "a b -> (a b)")
    with standing_in(_IMAGE_LIBRARIES):
        yield


def _to_unit(image: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bytes from 0 to 255 to floats from 0 to 1; floats are not changed."""
    return image.to(dtype) if image.is_floating_point() else image.to(dtype) / 255


def _resize(image: torch.Tensor, size: Sequence[int], **_: Any) -> torch.Tensor:
    """``[height, width, channels]`` float to ``[*size, channels]``, bilinear, antialiased."""
    planes = image.permute(2, 0, 1)[None]
    resized = functional.interpolate(
        planes, size=tuple(size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).contiguous()


class _Resize:
    """``torchvision.transforms.Resize``, of a float image ``[channels, height, width]``."""

    def __init__(self, size: Sequence[int], *_args: Any, **_options: Any) -> None:
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return _resize(image.permute(1, 2, 0), self.size).permute(2, 0, 1)


_BILINEAR = SimpleNamespace(BILINEAR="bilinear")
_IMAGE_LIBRARIES: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "torchvision.transforms": {"InterpolationMode": _BILINEAR, "Resize": _Resize},
    "torchvision.transforms.functional": {"convert_image_dtype": _to_unit},
    "tensorflow": {
        "image": SimpleNamespace(
            convert_image_dtype=_to_unit, resize=_resize, ResizeMethod=_BILINEAR
        ),
        "constant": torch.as_tensor,
        "clip_by_value": torch.clamp,
        "float32": torch.float32,
    },
}
