"""The streamed numbers against the plain formulas in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qeff_proxy.compare.statistics import (
    STATS,
    Scratch,
    cosine,
    measure,
    merge,
    relative_peak,
    sqnr_db,
    to_numbers,
)
from qeff_proxy.dump.format import DTYPES

ELEMENTWISE = (1e-3, 1e-2)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
PLAIN = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)
ANY = st.one_of(PLAIN, st.sampled_from([np.nan, np.inf, -np.inf]))


@st.composite
def pairs(draw, elements, dtype=np.float32):
    shape = draw(SHAPES)
    return tuple(draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(2))


@settings(max_examples=200)
@given(pairs(ANY))
def test_a_row_has_the_numbers_of_the_formulas(pair):
    stats = measure(*pair, ELEMENTWISE, Scratch())
    for row, r, c in zip(stats, *(a.astype(np.float64) for a in pair), strict=True):
        finite = np.isfinite(r) & np.isfinite(c)
        same = (np.isnan(r) & np.isnan(c)) | (r == c)
        assert row["count"] == r.size
        assert row["finite"] == finite.sum()
        assert row["unmatched"] == (~finite & ~same).sum()
        assert (row["reference_nan"], row["candidate_nan"]) == (
            np.isnan(r).sum(),
            np.isnan(c).sum(),
        )
        assert (row["reference_inf"], row["candidate_inf"]) == (
            np.isinf(r).sum(),
            np.isinf(c).sum(),
        )
        if row["unmatched"]:
            assert row["unmatched_at"] == np.argmax(~finite & ~same)
        r, c = np.where(finite, r, 0), np.where(finite, c, 0)
        error = np.abs(r - c)
        assert row["max_abs"] == pytest.approx(error.max(), rel=1e-5)
        assert row["sum_abs"] == pytest.approx(error.sum(), rel=1e-5)
        assert row["peak"] == pytest.approx(np.abs(r).max())
        if finite.any() and error.max() > 0:
            assert error[row["max_abs_at"]] == pytest.approx(error.max(), rel=1e-5)
            assert row["reference_there"] == pytest.approx(r[row["max_abs_at"]])
            assert row["candidate_there"] == pytest.approx(c[row["max_abs_at"]])
        known = r != 0
        relative = error[known] / np.abs(r[known])
        assert row["nonzero"] == known.sum()
        assert row["max_rel"] == pytest.approx(relative.max() if known.any() else 0, rel=1e-4)
        assert row["sum_rel"] == pytest.approx(relative.sum(), rel=1e-4)
        bound = ELEMENTWISE[0] + ELEMENTWISE[1] * np.abs(r)
        clear = np.abs(error - bound) > 1e-5 * (bound + error)
        outside = ((error > bound) & clear).sum()
        assert outside <= row["outside"] <= outside + (~clear).sum()


@settings(max_examples=100)
@given(pairs(PLAIN, np.float64))
def test_sqnr_cosine_and_peak(pair):
    stats = measure(*pair, None, Scratch())
    for row, r, c in zip(stats, *pair, strict=True):
        noise, signal = ((r - c) ** 2).sum(), (r**2).sum()
        if noise == 0:
            assert sqnr_db(row) == np.inf
        elif signal:
            assert sqnr_db(row) == pytest.approx(10 * np.log10(signal / noise), abs=1e-6)
        norms = np.linalg.norm(r) * np.linalg.norm(c)
        if norms:
            assert cosine(row) == pytest.approx(float(r @ c / norms), abs=1e-7)
        if np.abs(r).max():
            assert relative_peak(row) == pytest.approx(np.abs(r - c).max() / np.abs(r).max())


def test_the_cosine_keeps_the_digits_that_matter():
    rng = np.random.default_rng(0)
    r = rng.standard_normal((1, 60_000))
    c = r + 1e-4 * rng.standard_normal(r.shape)
    row = measure(r.astype(np.float32), c.astype(np.float32), None, Scratch())[0]
    exact = 1 - float((r[0] @ c[0]) / np.linalg.norm(r) / np.linalg.norm(c))
    assert 1 - cosine(row) == pytest.approx(exact, rel=0.02)


@settings(max_examples=100)
@given(pairs(ANY), st.integers(1, 5))
def test_blocks_give_what_the_whole_gives(pair, block):
    reference, candidate = (a.reshape(1, -1) for a in pair)
    whole = measure(reference, candidate, ELEMENTWISE, Scratch())[0]
    total, scratch = np.zeros(1, STATS), Scratch()
    total["unmatched_at"] = -1
    for at in range(0, reference.shape[1], block):
        part = np.s_[:, at : at + block]
        merge(total[0], measure(reference[part], candidate[part], ELEMENTWISE, scratch)[0], at)
    for key in ("count", "finite", "outside", "unmatched", "unmatched_at", "nonzero"):
        assert total[0][key] == whole[key]
    for key in ("max_abs", "sum_abs", "max_rel", "sum_rel", "peak", "signal", "power", "noise"):
        assert total[0][key] == pytest.approx(whole[key], rel=1e-5)
    if whole["max_abs"]:
        assert total[0]["reference_there"] - total[0]["candidate_there"] == pytest.approx(
            whole["reference_there"] - whole["candidate_there"]
        ) or abs(total[0]["reference_there"] - total[0]["candidate_there"]) == pytest.approx(
            whole["max_abs"], rel=1e-5
        )


def test_magnitudes_whose_squares_overflow_are_measured():
    reference, candidate = np.float32([[3e38, 1, np.inf]]), np.float32([[-3e38, 1, np.inf]])
    row = measure(reference, candidate, (0.0, 0.5), Scratch())[0]
    assert row["max_abs"] == pytest.approx(6e38)
    assert row["noise"] == pytest.approx(3.6e77)
    assert (row["outside"], row["unmatched"]) == (1, 0)


def test_integers_are_compared_exactly_beyond_float64():
    r = np.array([[2**53, 5]], np.int64)
    row = measure(r, np.add(r, [[1, 0]]), (0.0, 0.0), Scratch())[0]
    assert row["outside"] == 1


@pytest.mark.parametrize("dtype", [d for d, info in DTYPES.items() if info.inexact])
@pytest.mark.parametrize("wide", [False, True])
def test_stored_elements_become_numbers(dtype, wide):
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    values = np.array([[0, 0.5, -1.0, 1.5, np.nan]]).astype(kind)
    numbers = to_numbers(values.view(DTYPES[dtype].stored), dtype, wide, Scratch(), "x")
    assert numbers.dtype == (np.float64 if wide else np.float32)
    np.testing.assert_array_equal(numbers, values.astype(numbers.dtype))


def test_an_error_of_just_the_tolerance_is_within_it():
    reference, candidate = np.float32([[0, 0, 0]]), np.float32([[0.5, 1.0, 0.25]])
    assert measure(reference, candidate, (0.5, 0.0), Scratch())[0]["outside"] == 1
