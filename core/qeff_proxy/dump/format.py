"""Names, dtypes and constants of the dump format, which ``docs/dump-format.md`` specifies.

Nothing here touches a file: the writer, the reader and the converters share these definitions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qeff_proxy.common.messages import counted
from qeff_proxy.errors import DumpError

FORMAT = "qeff-proxy-dump"
VERSION = 1
MANIFEST = "manifest.json"
PHASES = ("prefill", "decode")

Phase = Literal["prefill", "decode"]
Direction = Literal["in", "out"]

MAX_RANK = 8
# The bytes between the start of a file and its first element; fixed, so that the header can be
# completed when the number of steps is known. A multiple of 64 (numpy's own alignment) that holds
# the longest header of MAX_RANK + 1 dimensions of 19 digits.
HEADER_BYTES = 320

_PART = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_TENSOR = re.compile(r"[A-Za-z0-9_]{1,128}\Z")
_NUMBERED = re.compile(r"(\d{1,4})(_.*)?\Z")
_NAME = re.compile(
    r"(?P<part>[a-z][a-z0-9_]{0,63})\.(?P<direction>in|out)\.(?P<tensor>[A-Za-z0-9_]{1,128})"
    r"(?:\.layer-(?P<layer>\d{2,4}))?\Z"
)


@dataclass(frozen=True)
class DtypeInfo:
    """How one dtype is stored.

    Attributes:
        stored: The little-endian numpy dtype string of the bytes on disk, such as ``<u2``.
        itemsize: Bytes of one element.
        inexact: Whether it is a floating point type; others are compared exactly.
        epsilon: Distance from 1 to the next number for a floating point type, else 0. The larger
            of two dtypes' epsilons is the coarser dtype.
    """

    stored: str
    itemsize: int
    inexact: bool
    epsilon: float


# True dtype -> how it is stored. numpy knows neither bfloat16 nor the 8-bit floats: their bits
# are stored as unsigned integers, since .npy would read them back as void.
DTYPES: dict[str, DtypeInfo] = {
    "bool": DtypeInfo("|b1", 1, False, 0.0),
    "int8": DtypeInfo("|i1", 1, False, 0.0),
    "int16": DtypeInfo("<i2", 2, False, 0.0),
    "int32": DtypeInfo("<i4", 4, False, 0.0),
    "int64": DtypeInfo("<i8", 8, False, 0.0),
    "uint8": DtypeInfo("|u1", 1, False, 0.0),
    "uint16": DtypeInfo("<u2", 2, False, 0.0),
    "uint32": DtypeInfo("<u4", 4, False, 0.0),
    "uint64": DtypeInfo("<u8", 8, False, 0.0),
    "float16": DtypeInfo("<f2", 2, True, 2.0**-10),
    "float32": DtypeInfo("<f4", 4, True, 2.0**-23),
    "float64": DtypeInfo("<f8", 8, True, 2.0**-52),
    "bfloat16": DtypeInfo("<u2", 2, True, 2.0**-7),
    "float8_e4m3fn": DtypeInfo("|u1", 1, True, 2.0**-3),
    "float8_e4m3fnuz": DtypeInfo("|u1", 1, True, 2.0**-3),
    "float8_e5m2": DtypeInfo("|u1", 1, True, 2.0**-2),
    "float8_e5m2fnuz": DtypeInfo("|u1", 1, True, 2.0**-2),
}
# Those whose bits are stored as unsigned integers.
AS_BITS = frozenset(name for name in DTYPES if name.startswith(("bfloat", "float8")))


@dataclass(frozen=True)
class TensorName:
    """The name under which a tensor is dumped: ``body.out.present_key.layer-07``.

    Attributes:
        part: The part it went into or came out of, such as ``body``.
        direction: ``in`` or ``out``.
        tensor: The graph's name for it without the layer, dots as underscores.
        layer: Its depth, counted from 0, or None when it belongs to no layer.
    """

    part: str
    direction: Direction
    tensor: str
    layer: int | None = None

    def __str__(self) -> str:
        suffix = "" if self.layer is None else f".layer-{self.layer:02d}"
        return f"{self.part}.{self.direction}.{self.tensor}{suffix}"

    @classmethod
    def parse(cls, text: str) -> TensorName:
        """Return the name that ``text`` spells.

        Raises:
            ValueError: ``text`` is not the canonical spelling of a name.
        """
        match = _NAME.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not of the form part.in|out.tensor[.layer-NN]")
        layer = match["layer"]
        direction: Direction = "in" if match["direction"] == "in" else "out"
        name = cls(match["part"], direction, match["tensor"], None if layer is None else int(layer))
        if str(name) != text:
            raise ValueError(f"{text!r} is not canonical: write {name}")
        return name


def name_tensor(part: str, direction: Direction, graph_name: str) -> TensorName:
    """Map a graph's tensor name to the name it is dumped under.

    The first component of the dotted name that is a number (or begins with one and an underscore)
    is the layer; the other components are joined by underscores, and what is neither letter, digit
    nor underscore becomes an underscore: ``present.7.key`` is ``present_key`` of layer 7.

    Raises:
        DumpError: The part or the tensor has no valid name.
    """
    if not _PART.match(part):
        raise DumpError(f"{part!r} cannot name a part", "Use lower-case letters, digits and '_'.")
    layer: int | None = None
    kept: list[str] = []
    for component in graph_name.split("."):
        match = _NUMBERED.match(component) if layer is None else None
        if match is None:
            kept.append(component)
        else:
            layer = int(match[1])
            kept.extend([match[2].lstrip("_")] if match[2] else [])
    tensor = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(kept))
    if not _TENSOR.match(tensor):
        raise DumpError(f"the graph tensor {graph_name!r} of part {part!r} has no usable name")
    return TensorName(part, direction, tensor, layer)


def step_label(phase: str, index: int) -> str:
    """Return what people call a step: ``prefill-0000``, ``decode-0003``."""
    return f"{phase}-{index:04d}"


def dtype_name(array: NDArray[Any], true_dtype: str | None, where: str) -> str:
    """Return the true dtype of ``array``, a key of `DTYPES`.

    Args:
        array: The tensor; ml_dtypes arrays (bfloat16, float8) are known by their dtype's name.
        true_dtype: What the elements are when numpy cannot say (bfloat16 bits in uint16), or None.
        where: The tensor's name, for the error.

    Raises:
        DumpError: The dtype cannot be dumped, or its size is not the array's.
    """
    name = true_dtype if true_dtype is not None else array.dtype.name
    info = DTYPES.get(name)
    if info is None:
        raise DumpError(f"{where} has dtype {name}, which cannot be dumped")
    if info.itemsize != array.dtype.itemsize:
        raise DumpError(
            f"{where} is said to be {name} ({counted(info.itemsize, 'byte')} an element) "
            f"but comes as {array.dtype.name}"
        )
    if true_dtype is not None and array.dtype.name != name and array.dtype.kind not in "uiV":
        raise DumpError(f"{where} is said to be {name} but comes as {array.dtype.name}")
    return name


def as_values(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """View stored elements as their true dtype (an ml_dtypes one for bfloat16 and float8)."""
    if dtype not in AS_BITS:
        return stored
    import ml_dtypes

    return stored.view(np.dtype(getattr(ml_dtypes, dtype)))
