"""A fault that comes between two nights is named by model, backend and layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from qeff_proxy.cli import main
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep import Ledger, read_plan, run_sweep
from qeff_proxy.sweep.compare_nights import compare_nights
from qeff_proxy.sweep.ledger import Divergence, Layer, Night, Record

pytestmark = pytest.mark.one_home

PLAN = """
[models]
llama = "{source}"
gone = "./gone"
[backends.onnxruntime]
[backends.toy]
[backends.nonesuch]
[settings.short]
max_new_tokens = 3
num_cores = 1
[inputs.ids]
ids = [[5, 17, 29, 41, 53]]
"""
LLAMA = "llama/toy/short/ids"


@pytest.fixture(scope="module")
def three_nights(
    tmp_path_factory: pytest.TempPathFactory, toys: Path, make_model: Any
) -> Iterator[Path]:
    """The ledger of three nights; between the last two, layer 3 of the toy backend went wrong."""
    folder = tmp_path_factory.mktemp("nights")
    make_model("llama", layers=5).save_pretrained(folder / "checkpoint")
    plan = folder / "plan.toml"
    plan.write_text(PLAN.format(source=folder / "checkpoint"))
    backend = toys / "toy_backend.py"
    code = backend.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(folder / "home"))
        first = run_sweep(read_plan(plan), workers=2)
        assert len(first.ran) == 6
        second = run_sweep(read_plan(plan), workers=2)
        assert second.ran == []
        backend.write_text(code.replace("LAYER = None", "LAYER = 3"))
        try:
            reload_toy()
            third = run_sweep(read_plan(plan), workers=2)
            assert sorted(third.ran) == ["gone/toy/short/ids", LLAMA]
        finally:
            backend.write_text(code)
            reload_toy()
        yield folder / "ledger.jsonl"


def reload_toy() -> None:
    """A sweep is a new process each night, and this test is one."""
    import sys

    sys.modules.pop("toy_backend", None)


def test_the_cells_of_a_night_have_all_that_verify_measures(three_nights: Path) -> None:
    first = {record.name: record for record in list(Ledger(three_nights).new_records())[:6]}
    record = first["llama/onnxruntime/short/ids"]
    assert (record.verdict, record.equal_tokens, record.tokens) == ("passed", 3, 3)
    assert [layer.at for layer in record.layers] == [f"body layer {n}" for n in range(5)]
    assert all(layer.error is not None and layer.error < 1e-5 for layer in record.layers)
    assert record.sqnr is not None
    assert record.sqnr > 80
    assert record.precision == "float32"
    assert {"torch", "onnxruntime", "qeff-proxy"} <= record.versions.keys()
    assert record.peak_memory is not None
    assert record.peak_memory > 100_000_000
    assert {"loading", "running onnxruntime", "total"} <= record.seconds.keys()
    assert record.report is not None
    assert "<!doctype html>" in (three_nights.parent / record.report).read_text()
    fingerprint = json.loads(three_nights.read_text().splitlines()[0]).get("fingerprint", {})
    assert len(json.dumps(fingerprint)) < 4000
    assert first["gone/toy/short/ids"].verdict == "refused"
    assert "there is no folder" in first["gone/toy/short/ids"].reason
    assert "there is no backend 'nonesuch'" in first["llama/nonesuch/short/ids"].reason
    assert list((three_nights.parent / "ledger" / "running").iterdir()) == []


def test_one_export_serves_all_backends(three_nights: Path) -> None:
    home = three_nights.parent / "home"
    assert len([path for path in home.iterdir() if (path / "export.json").is_file()]) == 1


def test_the_fault_is_named_by_model_backend_and_layer(
    three_nights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare_nights(three_nights)
    worse = [change for change in compared.changes if change.worse]
    assert [(change.name, change.kind, change.at) for change in worse] == [
        (LLAMA, "verdict", "body layer 3")
    ]
    assert "passed became failed, first at body layer 3 (body.out." in worse[0].what
    assert "toy-sdk 1 → 2" in worse[0].what
    assert "first moved at body.out.hidden_states.layer-03, by" in worse[0].what
    assert main(["sweep", "diff", str(three_nights)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"worse {LLAMA} body layer 3 passed became failed" in out
    nights = [night.night for night in Ledger(three_nights).new_nights()]
    assert main(["sweep", "diff", str(three_nights), *nights[:2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == []
    # Backwards, it is an improvement.
    assert main(["sweep", "diff", str(three_nights), nights[2], nights[1]]) == 0


def test_the_page_names_it_and_links_to_both_reports(
    three_nights: Path, capsys: pytest.CaptureFixture[str], browse: Callable[..., Any]
) -> None:
    page = three_nights.parent / "page.html"
    assert main(["sweep", "report", str(three_nights), "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {page}\n")
    text = page.read_text()
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)
    shown = browse(
        text,
        """
        const item = document.querySelector("#changes li");
        const cells = [...document.querySelectorAll("#cells td")];
        return {
          item: item.textContent,
          links: [...item.querySelectorAll("a")].map((a) => a.getAttribute("href")),
          head: [...document.querySelectorAll("#cells th")].map((th) => th.textContent),
          words: cells.map((td) => td.textContent),
          colours: new Set(cells.map((td) => getComputedStyle(td).backgroundColor)).size,
          dots: cells.map((td) => td.querySelectorAll("circle").length),
        };
        """,
    )
    assert LLAMA in shown["item"]
    assert "body layer 3" in shown["item"]
    assert [(three_nights.parent / link).is_file() for link in shown["links"]] == [True, True]
    assert shown["head"][:2] == ["model", "onnxruntime/short/ids"]
    assert shown["words"] == ["passed", "FAILED", "refused", "refused", "refused", "refused"]
    assert shown["dots"] == [1, 2, 1, 1, 2, 1]
    assert shown["colours"] == 2


def test_ci_gets_junit_and_markdown(
    three_nights: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    junit = tmp_path / "junit.xml"
    assert main(["sweep", "diff", str(three_nights), "--junit", str(junit), "--markdown"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("**1 got worse, ")
    assert f"| worse | {LLAMA} | body layer 3 | passed became failed" in out
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    failed = [case for case in suite if len(case)]
    assert [(case.get("classname"), case.get("name")) for case in failed] == [
        ("llama", "toy/short/ids")
    ]


# From here on, ledgers that are written by hand.


CELL = "m/b/s/i"


class History:
    """A ledger of one cell, with a record a night."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.count = 0

    def night(
        self,
        name: str = CELL,
        *,
        others: dict[str, str] | None = None,
        left_out: tuple[str, ...] = (),
        **more: Any,
    ):
        self.count += 1
        night = f"n{self.count:02}"
        identity = f"{self.count:064}"
        if name:
            record = {
                "id": identity,
                "name": name,
                "night": night,
                "time": f"2026-01-{self.count:02}T00:00:00Z",
                "verdict": "passed",
                "error": 1e-4,
                "seconds": {"running b": 10.0},
                **more,
            }
            self.ledger.append(msgspec.convert(msgspec.to_builtins(record), Record))
        cells = {**({name: identity} if name else {}), **(others or {})}
        self.ledger.append_night(Night(night, "plan", cells, left_out))
        return self

    def changes(self) -> list[tuple[str, bool, str]]:
        compared = compare_nights(self.ledger.path)
        return [(change.kind, change.worse, change.what) for change in compared.changes]


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def layers(*errors: float) -> list[Layer]:
    return [
        Layer(f"body layer {place}", error, -20 * math.log10(error))
        for place, error in enumerate(errors)
    ]


def test_an_error_that_leaves_its_band_names_the_first_layer(history: History) -> None:
    for noise in (1.0, 1.02, 0.99, 1.01):
        history.night(layers=layers(1e-4, 1e-4 * noise, 2e-4), error=2e-4)
    assert history.changes() == []
    history.night(layers=layers(1e-4, 1.5e-4, 3e-4), error=3e-4)
    (change,) = history.changes()
    assert change[:2] == ("numbers", True)
    assert change[2].startswith(
        "the error of body layer 1 is 0.015% of peak, above its usual 0.01%"
    )


def test_the_band_is_as_wide_as_the_cell_is_noisy(history: History) -> None:
    for noise in (1.0, 2.0, 0.5, 1.5, 0.8):
        history.night(error=1e-4 * noise)
    history.night(error=3e-4)
    assert history.changes() == []
    history.night(error=1e-2)
    assert [change[:2] for change in history.changes()] == [("numbers", True)]


def test_a_smaller_error_is_no_harm_and_two_nights_give_a_factor(history: History) -> None:
    history.night(error=1e-4).night(error=1.8e-4)
    assert history.changes() == []
    history.night(error=1e-6)
    assert [change[:2] for change in history.changes()] == [("numbers", False)]


def test_a_slower_run_is_worse(history: History) -> None:
    for seconds in (10.0, 10.5, 9.8):
        history.night(seconds={"running b": seconds})
    history.night(seconds={"running b": 25.0})
    ((kind, worse, what),) = history.changes()
    assert (kind, worse) == ("time", True)
    assert what == "it runs slower: 25.00 s, usually 10"
    history.night(speed=100.0).night(speed=100.0).night(speed=60.0)
    assert [change[:2] for change in history.changes()] == [("time", True)]


@pytest.mark.parametrize(("layer", "worse"), [(2, True), (7, False)])
def test_a_divergence_that_moves_is_worse_if_earlier(
    history: History, layer: int, worse: bool
) -> None:
    for at in (4, layer):
        where = Divergence("body", f"body.out.hidden_states.layer-{at:02}", at, "prefill-0000")
        history.night(verdict="failed", divergence=where)
    ((kind, is_worse, what),) = history.changes()
    assert (kind, is_worse) == ("divergence", worse)
    assert "moved from body layer 4 (body.out.hidden_states.layer-04, prefill-0000) to body" in what


def test_refused_missing_new_and_not_run_cells_are_told(history: History) -> None:
    history.night(verdict="failed").night(verdict="refused", reason="no such operator")
    assert history.changes() == [("refused", True, "failed became refused: no such operator")]
    history.night("", others={"x/b/s/i": "f" * 64})
    assert [change[:2] for change in history.changes()] == [("not run", True), ("missing", True)]
    history.night()
    assert [change[:2] for change in history.changes()] == [("new", False), ("missing", True)]


def test_a_cell_that_was_not_to_run_is_not_worse(history: History) -> None:
    history.night().night("", others={CELL: "f" * 64, "x/b/s/i": "e" * 64}, left_out=(CELL,))
    assert [change[:2] for change in history.changes()] == [("not run", True)]


def test_what_was_set_otherwise_is_told(history: History) -> None:
    history.night(setting={"tol": ["*=peak:0.05"]}, options={"soc": "a"})
    history.night(verdict="failed", reason="off", options={"soc": "b"})
    ((_, worse, what),) = history.changes()
    assert worse
    assert what == "passed became failed: off (tol ['*=peak:0.05'] → none, soc a → b)"


def test_an_unknown_night_or_ledger_is_refused(history: History, tmp_path: Path) -> None:
    history.night()
    with pytest.raises(UsageError, match=r"has no night 'n9'\. The last ones are n01"):
        compare_nights(history.ledger.path, ("n9", "n01"))
    with pytest.raises(UsageError, match="there is no ledger"):
        compare_nights(tmp_path / "none.jsonl")
