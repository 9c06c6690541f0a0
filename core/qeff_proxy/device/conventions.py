"""What only the user can say of a tool's files: dtypes, layouts, scales and names.

Each is an option ``GLOB=VALUE`` that may be repeated; the last glob that matches counts. A glob is
compared with the graph's name of a tensor and with the name that its counterpart has
(``past_key_values.0.key`` and ``past_key.0`` for ``present.0.key``), so that a cache's layout is
said once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from qeff_proxy.dump.format import DTYPES
from qeff_proxy.errors import UsageError

_T = TypeVar("_T")
_CACHE = re.compile(r"(present|past_key_values)\.(\d+)\.(key|value)\Z")
#: The order of axes that the graphs have, for letters that need no ``FROM>TO``.
_ORDERS = ("BHSD", "NCHW", "BSD")

#: Where the valid rows of a cache are in its file: where the packed ones are, at the front or back
#: of padding or without any, or only those that the step added.
Rows = Literal["whole", "front", "back", "new"]


@dataclass(frozen=True)
class Quantized:
    """Integers that stand for ``scale * (integer + offset)``.

    Attributes:
        dtype: Of the integers.
        scale: Of the values.
        offset: Added first; the negative of ONNX's zero point.
    """

    dtype: str
    scale: float
    offset: int = 0


@dataclass(frozen=True)
class Conventions:
    """The options of a packed folder, or of the files that came back.

    Attributes:
        dtypes: Glob → dtype of the files.
        layouts: Glob → order of axes.
        quantized: Glob → integers and scale.
        names: File name or glob → graph name; an empty name leaves the file out.
        rows: Where the caches' valid rows are in the files.
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    rows: Rows = "whole"

    @classmethod
    def parse(
        cls,
        dtypes: Iterable[str] = (),
        layouts: Iterable[str] = (),
        quantized: Iterable[str] = (),
        names: Iterable[str] = (),
        rows: Rows = "whole",
    ) -> Conventions:
        """Read the options of the command line.

        Raises:
            UsageError: One cannot be right; names it.
        """
        known = _pairs(dtypes, "--dtype", "GLOB=DTYPE")
        for glob, dtype in known.items():
            if dtype not in DTYPES:
                raise UsageError(
                    f"--dtype {glob}={dtype}: there is no dtype {dtype!r}",
                    f"Choose one of {', '.join(DTYPES)}.",
                )
        scales = _pairs(quantized, "--quantized", "GLOB=DTYPE,scale:S[,offset:N|,zero_point:N]")
        return cls(
            dtypes=known,
            layouts=_pairs(layouts, "--layout", "GLOB=B,S,H,D or GLOB=NCHW>NHWC"),
            quantized={glob: _quantized(glob, text) for glob, text in scales.items()},
            names=_pairs(names, "--name", "FILE=TENSOR", empty=True),
            rows=rows,
        )

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse a glob that matches no tensor.

        Raises:
            UsageError: Names it.
        """
        known = list(names)
        for option, globs in (
            ("--dtype", self.dtypes),
            ("--layout", self.layouts),
            ("--quantized", self.quantized),
        ):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for each in known for name in spellings(each)):
                    raise UsageError(
                        f"{option} {glob} matches no tensor", f"There are {', '.join(known[:8])}."
                    )

    def axes(self, name: str, rank: int) -> tuple[int, ...] | None:
        """The file's order of a tensor's axes; None where it is the graph's.

        Raises:
            UsageError: The layout's letters do not fit the tensor.
        """
        text = pick(self.layouts, name)
        return None if text is None else _axes(text, name, rank)


def spellings(name: str) -> list[str]:
    """The names by which options can mean a tensor."""
    match = _CACHE.match(name)
    if match is None:
        return [name]
    _, layer, kind = match.groups()
    return [name, f"past_key_values.{layer}.{kind}", f"past_{kind}.{layer}"]


def pick(options: Mapping[str, _T], name: str) -> _T | None:
    """The value of the last glob that matches a tensor, or None."""
    known = spellings(name)
    found = [v for glob, v in options.items() if any(fnmatchcase(each, glob) for each in known)]
    return found[-1] if found else None


def _pairs(texts: Iterable[str], option: str, form: str, *, empty: bool = False) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        left, equals, right = text.rpartition("=")
        if not left or not equals or not (right or empty):
            raise UsageError(f"{option} {text} is not {form}")
        pairs.pop(left, None)  # the last one counts
        pairs[left] = right
    return pairs


def _quantized(glob: str, text: str) -> Quantized:
    dtype, *fields = text.split(",")
    values = dict(part.partition(":")[::2] for part in fields)
    try:
        scale = float(values.pop("scale"))
        offset = int(values.pop("offset", 0)) - int(values.pop("zero_point", 0))
        if values or len(fields) > 2 or not math.isfinite(scale) or scale <= 0:
            raise ValueError
        if dtype not in DTYPES or DTYPES[dtype].inexact or dtype == "bool":
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(
            f"--quantized {glob}={text} is not GLOB=DTYPE,scale:S with offset:N or zero_point:N",
            "Such as 'logits=uint8,scale:0.12,offset:-128': value = scale * (integer + offset).",
        ) from None
    return Quantized(dtype, scale, offset)


def _axes(text: str, name: str, rank: int) -> tuple[int, ...]:
    letters, arrow, target = (part.replace(",", "").strip() for part in text.partition(">"))
    if not arrow:
        target = letters
        letters = next((order for order in _ORDERS if sorted(order) == sorted(target)), "")
    if sorted(letters) != sorted(target) or len(set(letters)) != len(letters) or not letters:
        raise UsageError(
            f"--layout {text} is no order of axes",
            f"Use the letters of {', '.join(_ORDERS)}, or say both: NCHW>NHWC.",
        )
    if len(letters) != rank:
        raise UsageError(
            f"--layout {text} has {len(letters)} axes, and {name} has {rank}",
            "Narrow the glob.",
        )
    return tuple(letters.index(letter) for letter in target)
