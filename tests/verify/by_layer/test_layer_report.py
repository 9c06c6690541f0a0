"""The page of ``verify --by-layer --html``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from qeff_proxy.compare import Tolerances
from qeff_proxy.verify.by_layer.report import build_layer_report, write_layer_reports
from qeff_proxy.verify.by_layer.results import (
    BackendLayers,
    KindError,
    LayerError,
    LayerResult,
    LayerVerification,
    compare_layer,
)
from qeff_proxy.verify.options import VerifyOptions

pytestmark = pytest.mark.one_home

EXPORT = SimpleNamespace(
    model={"source": "m", "architecture": "M"}, made_by={"torch": "2.0"}, dtype="float32"
)
FACTS = {"input": "'Hello'", "date": "2026-01-31"}


def error(share: float, *, passed: bool = True, floor: float | None = None) -> LayerError:
    sqnr = -20 * math.log10(share) if share else math.inf
    kinds = (
        () if floor is None else (KindError("hidden_states in prefill", sqnr, floor, floor - 20),)
    )
    return LayerError(passed, "hidden_states.0", "decode-0002", 2 * share, share, sqnr, kinds)


def verification(floor: float | None = 70.0) -> LayerVerification:
    """An encoder, a body of 6 layers, of which 3 has a fault of its own."""
    exact = LayerResult("encoder", None, error(0.0), error(0.0))
    body = [
        LayerResult(
            "body",
            layer,
            error(0.1 if layer == 3 else 1e-6, passed=layer != 3, floor=floor),
            error(1e-5 if layer < 3 else 0.2, passed=layer < 3, floor=floor),
        )
        for layer in range(6)
    ]
    head = LayerResult("lm_head", None, error(2e-6), error(0.2, passed=False))
    layers = BackendLayers("engine", (exact, *body, head))
    return LayerVerification("m", Path("export"), ("prefill-0000", "decode-0000"), (layers,))


SEEN = """
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((node) => node.textContent);
const box = document.querySelector(".scroll"), hidden = (id) => document.getElementById(id).hidden;
const target = all("#layer-plot circle[fill=transparent]")[4];
if (target) target.dispatchEvent(new MouseEvent("mousemove", { clientX: 50, clientY: 50 }));
return {
  ticks: texts("#layer-plot text"), legend: texts("#layer-legend span"),
  dashes: all("#decibel-plot polyline").map((line) => line.getAttribute("stroke-dasharray")),
  headings: texts("h2"), columns: texts("#tensors th"), rows: all("#tensors tbody tr").map(
    (row) => [...row.cells].map((cell) => cell.textContent)),
  cut: box.scrollWidth - box.clientWidth,
  cards: texts("#worst .name"), tip: document.getElementById("tip").textContent,
  hidden: ["layers", "decibel", "heat", "worst", "table"].filter((name) => hidden(name + "-card")),
  floor: all(".floor").some((node) => node.hidden),
};
"""


def seen(browse, done: LayerVerification):
    page = build_layer_report(done, done.results[0], "m (Model)", FACTS)
    return page, browse(page, SEEN, "--window-size=1280,900")


def test_local_and_inherited_errors_with_floor_and_limit_are_drawn(browse):
    page, shown = seen(browse, verification())
    assert "<title>Verification by layer: m (Model)</title>" in page
    assert "engine: FAILED: out of line by its own error: body layer 3, of 8 pieces." in page
    assert "<dt>input</dt><dd>&#x27;Hello&#x27;</dd>" in page
    assert shown["legend"] == ["local", "inherited"]
    marks = {"encoder", "body 0", "1", "2", "3", "4", "5", "lm_head", "first fault of its own"}
    assert marks < set(shown["ticks"])
    assert shown["dashes"] == ["2 4", "7 4", "none"] * 2
    assert shown["tip"] == ("local, body layer 3: 10% FAILED (hidden_states.0 in decode-0002)")
    assert shown["cards"][0] == "body layer 3"
    assert len(shown["rows"]) == 2 * 8
    assert shown["columns"] == [
        "piece", "error", "max error", "at", "error/peak", "SQNR dB", "floor", "limit", "SQNR of",
        "verdict",
    ]  # fmt: skip
    row = next(row for row in shown["rows"] if row[:2] == ["body layer 3", "local"])
    assert row[2:] == [
        "0.200", "hidden_states.0 in decode-0002", "10%", "20.0", "70.0", "50.0",
        "hidden_states in prefill", "FAILED",
    ]  # fmt: skip
    assert shown["cut"] == 0
    assert shown["hidden"] == ["heat"]
    assert {"Worst pieces", "All pieces"} < set(shown["headings"])


def test_without_floors_the_page_does_not_speak_of_them(browse):
    _, shown = seen(browse, verification(floor=None))
    assert shown["dashes"] == ["none"] * 2
    assert shown["floor"]
    assert not {"floor", "limit", "SQNR of"} & set(shown["columns"])


def test_a_backend_of_which_nothing_ran_has_a_page_without_plots(browse):
    nothing = BackendLayers("engine", (), error="embedding: no <room>")
    page, shown = seen(browse, replace(verification(), results=(nothing,)))
    assert "engine: ERROR in embedding: no &lt;room&gt;" in page
    assert shown["hidden"] == ["layers", "decibel", "heat", "worst", "table"]
    interrupted = replace(nothing, error=None)
    done = replace(verification(), results=(interrupted,), interrupted="embedding")
    page = build_layer_report(done, interrupted, "m", FACTS)
    assert "engine: nothing ran" in page
    assert "interrupted at embedding: what follows did not run" in page
    assert 'class="card verdict pass"' not in page


@pytest.mark.parametrize("several", [False, True])
def test_each_backend_has_its_page(tmp_path, several):
    done = verification()
    if several:
        done = replace(done, results=(*done.results, replace(done.results[0], backend="other")))
    options = VerifyOptions(html=tmp_path / "page.html", backends={"engine": {"soc": "SM1"}})
    told = write_layer_reports(done, EXPORT, options, {"prompts": ["Hello"]})
    names = ["page.engine.html", "page.other.html"] if several else ["page.html"]
    assert [result.report.name for result in told.results] == names
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == names
    page = told.results[0].report.read_text()
    assert "<dt>options</dt><dd>batch_size=1, soc=SM1</dd>" in page
    assert "<dt>versions</dt><dd>torch 2.0; of engine unknown</dd>" in page
    assert "<dt>continuation</dt><dd>the prompt again" in page


def test_errors_are_not_lost_for_a_page_that_cannot_be_written(tmp_path):
    options = VerifyOptions(html=tmp_path / "missing" / "page.html")
    with pytest.warns(UserWarning, match="page.html cannot be written: No such file"):
        told = write_layer_reports(verification(), EXPORT, options, {})
    assert told.results[0].report is None
    assert len(told.results[0].layers) == 8


def test_the_tensor_shown_for_a_failing_piece_is_one_that_fails():
    """The largest error is in a step that passes, by a looser limit."""
    values = np.linspace(-1, 1, 8, dtype=np.float32)
    expected = {"prefill-0000": {"a": values}, "decode-0000": {"b": values}}
    actual = {"prefill-0000": {"a": values * 1.3}, "decode-0000": {"b": values * 1.1}}
    limits = Tolerances.parse(["*=peak:0.01", "body.out.a=peak:0.5"])
    shown = compare_layer(expected, actual, "body", limits)
    assert (shown.passed, shown.tensor, shown.step) == (False, "body.out.b", "decode-0000")
    assert shown.over_peak == pytest.approx(0.1)
