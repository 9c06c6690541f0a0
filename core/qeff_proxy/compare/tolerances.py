"""How far a tensor may be from its reference: by dtype, with overrides by glob."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase

from qeff_proxy.dump.format import DTYPES
from qeff_proxy.errors import UsageError


@dataclass(frozen=True)
class Tolerance:
    """The limits of one tensor's errors; a limit that is None is not checked.

    Attributes:
        atol: With ``rtol``: every element must have ``|candidate - reference| <= atol + rtol *
            |reference|``, as in ``numpy.allclose``. One that is None counts as 0 beside the other.
        rtol: See ``atol``.
        peak: The largest absolute error may be this share of the reference's largest magnitude.
        sqnr: The signal-to-quantization-noise ratio must be at least this many dB.
        cosine: The cosine similarity must be at least this.
        rounding: Elements beyond ``atol`` and ``rtol`` pass all the same where the error of the
            whole tensor is rounding: it is at most this share of the reference's largest magnitude,
            and the signal-to-quantization-noise ratio at least ``-20 * log10(rounding)`` dB. The
            elements of a sum carry the rounding of its largest terms, however small they are.
    """

    atol: float | None = None
    rtol: float | None = None
    peak: float | None = None
    sqnr: float | None = None
    cosine: float | None = None
    rounding: float | None = None

    @property
    def elementwise(self) -> tuple[float, float] | None:
        """``(atol, rtol)``, or None when elements are not checked one by one."""
        if self.atol is None and self.rtol is None and self.rounding is None:
            return None
        return self.atol or 0.0, self.rtol or 0.0

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ",".join(f"{name}:{value:g}" for name, value in given if value is not None)


# For the coarser dtype of the two. Runs of one model on two backends, not of one kernel: errors of
# many layers add up, so these are wider than those of a unit test: two ways of rounding to bfloat16
# are 40 dB apart behind 12 layers, 35 behind 32; its rounding=5e-2 allows 26 dB, 2e-2 would 34.
DEFAULTS: dict[str, Tolerance] = {
    "float64": Tolerance(1e-7, 1e-6, rounding=1e-9),
    "float32": Tolerance(1e-4, 1e-3, rounding=1e-5),
    "float16": Tolerance(1e-2, 1e-2, rounding=1e-2),
    "bfloat16": Tolerance(5e-2, 5e-2, rounding=5e-2),
    "float8_e4m3fn": Tolerance(2.5e-1, 2.5e-1),
    "float8_e4m3fnuz": Tolerance(2.5e-1, 2.5e-1),
    "float8_e5m2": Tolerance(5e-1, 5e-1),
    "float8_e5m2fnuz": Tolerance(5e-1, 5e-1),
}
EXACT = Tolerance(0.0, 0.0)

# Of a run that computes in less than its tensors' dtype: what it computes in → tolerance. a16w8 and
# a8w8 are activations and weights of so many bits; of the last two only the weights were cut.
# Elements are not checked one by one, since each carries the rounding of all layers before it.
COMPUTED_IN: dict[str, Tolerance] = {
    "float16": Tolerance(peak=0.03, sqnr=40.0),
    "bfloat16": Tolerance(peak=0.1, sqnr=25.0),
    "a16w8": Tolerance(peak=0.1, sqnr=25.0),
    "a8w8": Tolerance(peak=0.5, sqnr=12.0),
    "int8_weights": Tolerance(peak=0.15, sqnr=20.0),
    "int4_weights": Tolerance(peak=0.8, sqnr=5.0),
}


#: How many dB the error may be above the noise floor, as an amplitude 10 times. Of healthy models
#: on HTP in float16, the worst tensor is 17.6 dB above it (a trained Llama's decode steps) or 17.4
#: (a trained MiniLM, whose GELU HTP approximates); most are within 8. See docs/compare.md.
FLOOR_MARGIN = 20.0


#: So many elements average out: `FLOOR_MARGIN` was measured on tensors with as many and more.
_MANY = 64


def _spread_db(count: int) -> float:
    """Three standard deviations, in dB, of the ratio of two errors of ``count`` elements each.

    The log of a mean of ``count`` squares of normal numbers has the variance ``trigamma(count/2)``;
    of trigamma, the first terms of its series.
    """
    half = max(count, 1) / 2
    trigamma = 1 / half + 1 / (2 * half**2) + 1 / (6 * half**3)
    return 3 * 10 / math.log(10) * math.sqrt(2 * trigamma)


@dataclass(frozen=True)
class NoiseFloor:
    """The error that rounding to the candidate's precision alone causes in one tensor.

    Attributes:
        sqnr: Its signal-to-quantization-noise ratio in dB, of the worst step.
        peak: Its largest absolute error over the reference's largest magnitude, of the worst step.
        count: Elements of a step.
    """

    sqnr: float
    peak: float
    count: int = _MANY

    def widen(self, fixed: Tolerance) -> Tolerance:
        """``fixed``, or `FLOOR_MARGIN` above this floor where that allows more.

        The floor of a few elements (the logits of a classifier) is itself chance, and so is the
        candidate's error: below `_MANY` elements the margin grows by how far two such errors spread
        (`_spread_db`).

        It never allows more than `FLOOR_MARGIN` beyond ``fixed``: a model whose outputs this
        precision destroys is not to pass.
        """
        finite = math.isfinite(self.peak) and math.isfinite(self.sqnr)
        if fixed.sqnr is None or fixed.peak is None or not finite:
            return fixed
        margin = FLOOR_MARGIN + max(0.0, _spread_db(self.count) - _spread_db(_MANY))
        least = max(self.sqnr - margin, fixed.sqnr - FLOOR_MARGIN)
        most = min(self.peak * 10 ** (margin / 20), fixed.peak * 10 ** (FLOOR_MARGIN / 20))
        return replace(
            fixed,
            sqnr=min(fixed.sqnr, math.floor(10 * least) / 10),
            peak=max(fixed.peak, float(f"{most:.3g}")),
        )


@dataclass(frozen=True)
class Tolerances:
    """The tolerance of every tensor.

    Attributes:
        overrides: (glob over ``part.direction.tensor[.layer-NN]``, tolerance); the last that
            matches replaces the default of the dtype whole.
        precision: What the candidate computes in (`COMPUTED_IN`), where that is narrower than its
            tensors' own dtype: floating tensors get its limits.
        floors: The noise floors of that precision, by phase and name, where they were measured.
    """

    overrides: tuple[tuple[str, Tolerance], ...] = ()
    precision: str | None = None
    floors: Mapping[tuple[str, str], NoiseFloor] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Tolerances:
        """Read ``GLOB=atol:1e-3,rtol:1e-2`` options.

        Raises:
            UsageError: One is not of that form.
        """
        return cls(tuple(parse_tolerance(text) for text in texts))

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse an override that matches none of these tensors: its limit would never be checked.

        Raises:
            UsageError: Names the glob, and some of the tensors.
        """
        names = list(names)
        for glob, tolerance in self.overrides:
            if not any(fnmatchcase(name, glob) for name in names):
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                raise UsageError(
                    f"the tolerance {glob}={tolerance} holds no tensor",
                    f"There are {shown}.",
                )

    def among(self, names: Iterable[str]) -> Tolerances:
        """These, without overrides that hold none of some tensors."""
        known = list(names)
        used = [one for one in self.overrides if any(fnmatchcase(name, one[0]) for name in known)]
        return replace(self, overrides=tuple(used))

    def override(self, name: str) -> Tolerance | None:
        """The tolerance that the user gave for the tensor ``name``."""
        globs = reversed(self.overrides)
        return next((tolerance for glob, tolerance in globs if fnmatchcase(name, glob)), None)

    def of(
        self, name: str, reference_dtype: str, candidate_dtype: str, phase: str = ""
    ) -> Tolerance:
        """Return the limits of the tensor ``name``: integers and booleans must be equal."""
        if (named := self.override(name)) is not None:
            return named
        coarser = max((reference_dtype, candidate_dtype), key=lambda d: DTYPES[d].epsilon)
        narrow = self.precision
        if narrow in COMPUTED_IN and _epsilon(narrow) >= DTYPES[coarser].epsilon > 0:
            floor = self.floors.get((phase, name))
            return COMPUTED_IN[narrow] if floor is None else floor.widen(COMPUTED_IN[narrow])
        return DEFAULTS.get(coarser, EXACT)


def _epsilon(precision: str) -> float:
    """Of a dtype; what is quantized is coarser than any."""
    return DTYPES[precision].epsilon if precision in DTYPES else math.inf


#: The least and the most of a limit, where that is not any number from 0 on.
_LIMITS = {
    "cosine": (-1.0, 1.0),
    "sqnr": (-sys.float_info.max, sys.float_info.max),
    "rounding": (sys.float_info.min, 1.0),
}


def parse_tolerance(text: str) -> tuple[str, Tolerance]:
    """Read one ``GLOB=limit:value,...`` option.

    Raises:
        UsageError: It is not of that form.
    """
    known = [f.name for f in fields(Tolerance)]
    glob, equals, limits = text.rpartition("=")
    values: dict[str, float] = {}
    for item in limits.split(","):
        key, colon, number = item.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        low, high = _LIMITS.get(key, (0.0, sys.float_info.max))
        if key not in known or key in values or not colon or not (low <= value <= high):
            glob = ""
        values[key] = value
    if not equals or not glob:
        raise UsageError(
            f"{text!r} is not a tolerance",
            f"Write GLOB=LIMIT:VALUE[,LIMIT:VALUE…] with limits among {', '.join(known)}, "
            "such as 'body.out.*=atol:1e-3,rtol:1e-2'.",
        )
    return glob, Tolerance(**values)
