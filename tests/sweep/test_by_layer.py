"""Cells verified by layer: the ledger has what each layer adds, and names the faulty one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep import Ledger, read_plan, run_sweep
from qeff_proxy.sweep.compare_nights import compare_nights

pytestmark = pytest.mark.one_home

PLAN = """
[models]
llama = "checkpoint"
[backends.onnxruntime]
[backends.toy]
[settings.layers]
by_layer = true
max_new_tokens = 3
[inputs.ids]
ids = [[5, 17, 29, 41, 53]]
"""


@pytest.fixture(scope="module")
def two_nights(
    tmp_path_factory: pytest.TempPathFactory, toys: Path, make_model: Any
) -> Iterator[Path]:
    """The ledger of two nights; between them, layer 3 of the toy backend went wrong."""
    folder = tmp_path_factory.mktemp("by-layer")
    make_model("llama", layers=5).save_pretrained(folder / "checkpoint")
    plan, backend = folder / "plan.toml", toys / "toy_backend.py"
    plan.write_text(PLAN)
    code = backend.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(folder / "home"))
        try:
            for fault in ("None", "3"):
                backend.write_text(code.replace("LAYER = None", f"LAYER = {fault}"))
                sys.modules.pop("toy_backend", None)
                importlib.invalidate_caches()
                run_sweep(read_plan(plan), workers=2)
        finally:
            backend.write_text(code)
            sys.modules.pop("toy_backend", None)
        yield folder / "ledger.jsonl"


def test_the_ledger_has_the_error_of_each_layer(two_nights: Path) -> None:
    records = list(Ledger(two_nights).new_records())
    assert [(r.name, r.verdict) for r in sorted(records, key=lambda r: r.time)][-1:] == [
        ("llama/toy/layers/ids", "failed")
    ]
    assert len(records) == 3  # the other backend did not change
    bad = next(record for record in records if record.verdict == "failed")
    names = [f"body layer {place}" for place in range(5)]
    assert [layer.at for layer in bad.layers] == ["embedding", *names, "body", "lm_head"]
    errors = {layer.at: layer.error or 0.0 for layer in bad.layers}
    assert errors.pop("body layer 3") > 1e-3
    assert max(errors.values()) < 1e-5  # each was fed the reference's inputs
    assert bad.divergence is not None
    assert (bad.divergence.part, bad.divergence.layer) == ("body", 3)
    assert bad.reason.startswith("toy: FAILED: out of line by its own error: body layer 3")
    assert set(bad.seconds) == {"running toy", "total"}
    assert bad.report is not None
    assert "by layer" in (two_nights.parent / bad.report).read_text(encoding="utf-8")
    assert (two_nights.parent / "home" / (bad.export or "none") / "export.json").is_file()


def test_the_layer_that_turned_is_named_between_nights(two_nights: Path) -> None:
    (change,) = compare_nights(two_nights).changes
    assert (change.name, change.kind, change.at) == (
        "llama/toy/layers/ids",
        "verdict",
        "body layer 3",
    )


def test_a_number_makes_cells_of_the_layers(tmp_path: Path, make_model: Any) -> None:
    make_model("llama", layers=5).save_pretrained(tmp_path / "checkpoint")
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("[backends.toy]\n", "").replace("= true", "= 3"))
    sweep = run_sweep(read_plan(plan), workers=1)
    assert sweep.passed
    assert list(sweep.records) == [f"llama/onnxruntime/layers:{n}of3/ids" for n in (1, 2, 3)]
    names = [layer.at for record in sweep.records.values() for layer in record.layers]
    assert names == ["embedding", *(f"body layer {n}" for n in range(5)), "body", "lm_head"]


def test_what_excludes_by_layer_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[models]\nm = "m"\n[settings.s]\nby_layer = true\nspeed = true\n')
    with pytest.raises(UsageError, match=r"m/onnxruntime/s of .* has both by_layer and speed"):
        read_plan(plan)
