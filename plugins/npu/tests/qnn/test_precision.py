"""A backend that says what it computes in is held to that, not to its tensors' dtype."""

from __future__ import annotations

import pytest
from qeff_proxy.backends.registry import load_backend
from qeff_proxy.compare import Tolerance, Tolerances
from qeff_proxy.compile_options import CompileOptions

pytestmark = pytest.mark.one_home


def test_what_is_computed_in_half_precision_is_held_to_it() -> None:
    of = Tolerances(precision="float16").of
    assert of("body.out.x", "float32", "float32") == Tolerance(peak=0.03, sqnr=40.0)
    assert of("body.out.x", "float16", "float16") == Tolerance(peak=0.03, sqnr=40.0)
    assert of("body.in.input_ids", "int64", "int64") == Tolerance(0.0, 0.0)
    # A dtype that is coarser still decides for itself.
    assert of("x", "bfloat16", "bfloat16") == Tolerances().of("x", "bfloat16", "bfloat16")


def test_a_tolerance_that_the_user_gives_wins() -> None:
    given = Tolerances.parse(["*.x=sqnr:34"])
    both = Tolerances(given.overrides, "float16")
    assert both.of("body.out.x", "float32", "float32") == Tolerance(sqnr=34.0)


@pytest.mark.parametrize(("name", "precision"), [("qnn", "float16"), ("onnxruntime", None)])
def test_backends_say_what_they_compute_in(name: str, precision: str | None) -> None:
    backend, options = load_backend(name), CompileOptions()
    assert backend.precision(options) == precision
    assert backend.needs_fixed_shapes(options) == (name == "qnn")
