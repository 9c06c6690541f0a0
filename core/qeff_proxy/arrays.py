"""Tensors and arrays: the same bits on both sides, bfloat16 included."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qeff_proxy.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

if TYPE_CHECKING:
    Array = npt.NDArray[Any]
else:
    Array = np.ndarray

# Dtypes that NumPy itself lacks, and the integer type that holds their bits.
_BIT_TYPES = {
    "bfloat16": (ml_dtypes.bfloat16, np.uint16),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, np.uint8),
    "float8_e5m2": (ml_dtypes.float8_e5m2, np.uint8),
}


@functools.cache  # asked for at every step, for every tensor
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called ``name``; ``bfloat16`` and 8-bit floats come from ml_dtypes."""
    return np.dtype(_BIT_TYPES[name][0] if name in _BIT_TYPES else name)


def dtype_name(dtype: torch.dtype | str) -> str:
    """The dtype as `qeff_proxy.parts.TensorSpec` spells it: ``"float32"``, ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def to_array(tensor: torch.Tensor) -> Array:
    """``tensor`` as an array on the host, sharing its memory where that is possible."""
    import torch

    tensor = tensor.detach().cpu()
    name = dtype_name(tensor.dtype)
    if name not in _BIT_TYPES:
        return tensor.numpy()
    dtype, bits = _BIT_TYPES[name]
    integers = tensor.contiguous().view(torch.uint16 if bits is np.uint16 else torch.uint8)
    return integers.numpy().view(dtype)


def to_tensor(array: Array) -> torch.Tensor:
    """``array`` as a CPU tensor, sharing its memory where that is possible."""
    import torch

    name = array.dtype.name
    if name not in _BIT_TYPES:
        shared = array.flags.writeable and min(array.strides, default=0) >= 0
        return torch.from_numpy(array if shared else array.copy())
    bits = _BIT_TYPES[name][1]
    return torch.from_numpy(np.ascontiguousarray(array).view(bits).copy()).view(
        getattr(torch, name)
    )


def given_tensor(
    name: str, value: Any, hint: str = "Give a tensor, an array or lists."
) -> torch.Tensor:
    """A user's input, as a tensor.

    Args:
        name: The input's name, for the error.
        value: A tensor, an array, or lists of numbers of one length.
        hint: What to do, for the error.

    Raises:
        UsageError: It is something else, or a tensor without elements to read.
    """
    import torch

    if not isinstance(name, str):
        raise UsageError(f"an input is called {name!r}", "Names are text, such as 'input_ids'.")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the input {name!r} is no tensor: {error}", hint) from error
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else "a sparse or nested tensor"
        raise UsageError(f"the input {name!r} is {kind}", "Give a dense tensor with values.")
    return tensor


def given_tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All inputs as tensors, without those that are ``None``."""
    return {name: given_tensor(name, value) for name, value in inputs.items() if value is not None}
