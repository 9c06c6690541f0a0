from __future__ import annotations

import pytest
from qeff_proxy.compare import Tolerance, Tolerances
from qeff_proxy.dump.format import DTYPES
from qeff_proxy.errors import UsageError


def test_the_last_glob_that_matches_wins():
    tolerances = Tolerances.parse(["*=peak:0.1", "body.*=atol:1e-3,rtol:1e-2", "*.logits=cosine:1"])
    assert tolerances.of("lm_head.out.x", "float32", "float32") == Tolerance(peak=0.1)
    assert tolerances.of("body.out.x", "float32", "float32") == Tolerance(1e-3, 1e-2)
    assert tolerances.of("body.out.logits", "float32", "float32") == Tolerance(cosine=1)


def test_the_coarser_dtype_decides():
    of = Tolerances().of
    assert (
        of("x", "float32", "float16")
        == of("x", "float16", "float32")
        == of("x", "float16", "float16")
    )
    assert of("x", "float16", "bfloat16") == of("x", "bfloat16", "bfloat16")
    assert of("x", "float64", "float64").atol < of("x", "float32", "float32").atol


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_default(dtype):
    elementwise = Tolerances().of("x", dtype, dtype).elementwise
    assert (elementwise != (0.0, 0.0)) is DTYPES[dtype].inexact


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "=atol:1", "x=", "x=atol", "x=atol:", "x=atol:a", "x=atol:-1", "x=atol:nan"),
        *("x=size:1", "x=atol:1,atol:2", "x=atol:inf", "x=atol:1,", "x=cosine:5", "x=rounding:0"),
    ],
)
def test_what_is_no_tolerance_is_refused(text):
    with pytest.raises(UsageError, match="is not a tolerance"):
        Tolerances.parse([text])


def test_a_tolerance_is_written_as_it_is_read():
    text = "atol:0.001,rtol:0.01,peak:0.1,sqnr:40,cosine:0.99,rounding:1e-05"
    ((_, tolerance),) = Tolerances.parse([f"*={text}"]).overrides
    assert str(tolerance) == text
