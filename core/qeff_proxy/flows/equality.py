"""Compare the outputs of the parts with those of the model; shared by all flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from qeff_proxy.arrays import Array, dtype_name
from qeff_proxy.errors import CutError, UsageError
from qeff_proxy.flows.flow import CutReport
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Largest allowed difference of an element, relative to the largest element, by the model's dtype.
#: Model and parts run the same operations, so only the order of sums may differ.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
#: The same in float32 where the model scans several positions at once and the parts step through
#: them: the rounding of other operations, which further layers enlarge.
SCAN_TOLERANCE = 2e-4

#: The hint where the generic plugin does not suffice.
NEEDS_PLUGIN = "This architecture needs a plugin of its own."


@contextmanager
def parts_must_run(model: PreTrainedModel, sites: Mapping[str, Site | Absent]) -> Iterator[None]:
    """Turn an exception of a part into a `CutError` that names model and sites."""
    try:
        yield
    except (
        *(RuntimeError, TypeError, ValueError, LookupError, AttributeError),
        UsageError,  # what a part gave does not fit the next
    ) as error:
        raise CutError(
            f"the parts of {type(model).__name__} cannot be run ({_where(sites)}): "
            f"{type(error).__name__}: {error}",
            NEEDS_PLUGIN,
        ) from error


def check_equal(
    model: PreTrainedModel,
    sites: Mapping[str, Site | Absent],
    expected: Array,
    actual: Array,
    valid: Array | None = None,
    *,
    output: str = "element",
    scanned: bool = False,
) -> CutReport:
    """Compare the outputs of the parts with those of the model.

    Args:
        model: The uncut model; its dtype decides the tolerance.
        sites: Where it was cut, for the message.
        expected: The model's output, float32, any shape.
        actual: The parts' output.
        valid: Non-zero for the positions to compare, over the leading axes of ``expected``;
            ``None`` compares all.
        output: The word for an element in the message.
        scanned: The model computes several positions by other operations than the parts.

    Raises:
        CutError: Shapes differ, values differ by more than the tolerance, or the model itself
            outputs NaN or infinity.
    """
    name = type(model).__name__
    dtype = dtype_name(model.dtype)
    where = _where(sites)
    if expected.shape != actual.shape:
        raise CutError(
            f"the parts of {name} give {output}s {list(actual.shape)}, the model "
            f"{list(expected.shape)} ({where})",
            NEEDS_PLUGIN,
        )
    counts = np.ones(expected.shape[:1], bool) if valid is None else valid.astype(bool)
    if not np.isfinite(expected[counts]).all():
        raise CutError(
            f"{name} itself gives NaN or infinite {output}s in {dtype}",
            "Check the checkpoint's weights, or export in float32.",
        )
    trailing = (1,) * (expected.ndim - counts.ndim)
    difference = np.where(counts.reshape(*counts.shape, *trailing), np.abs(expected - actual), 0.0)
    tolerance = TOLERANCES.get(dtype, TOLERANCES["float32"])
    if scanned:
        tolerance = max(tolerance, SCAN_TOLERANCE)
    # A model bars a token with the lowest number, beside which no other counts.
    lowest = max(torch.finfo(model.dtype).min, float(np.finfo(np.float32).min))
    barred = expected <= lowest
    sizes = np.abs(np.where(barred, 0.0, expected))
    largest = float(sizes[counts].max())
    report = CutReport(float(difference.max()), largest, tolerance, dtype, int(counts.sum()))
    # Written so that a NaN fails.
    if not report.max_difference <= tolerance * max(largest, 1e-6):
        flat = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
        worst = tuple(int(index) for index in np.unravel_index(flat, difference.shape))
        raise CutError(
            f"the parts of {name} do not equal the uncut model ({where}): {output} {list(worst)} "
            f"is {actual[worst]:.6g} instead of {expected[worst]:.6g}, off by "
            f"{difference[worst]:.3g} with at most {tolerance * largest:.3g} allowed in {dtype}",
            NEEDS_PLUGIN,
        )
    return report


def _where(sites: Mapping[str, Site | Absent]) -> str:
    return ", ".join(
        f"no {name}: {site.reason}" if isinstance(site, Absent) else f"{name} at {site.module}"
        for name, site in sites.items()
    )
