"""Results have a short ``repr`` and an HTML view, not all that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.auto.embedding import EmbeddingResult
from qeff_proxy.common.shown import Shown
from qeff_proxy.request import Request
from qeff_proxy.verify import VerifyOptions, verify_model

LONGEST = 1500


@pytest.fixture(scope="module")
def verification(demo_export: Path) -> Any:
    options = VerifyOptions(max_new_tokens=2)
    request = Request(inputs={"input_ids": [[5, 6, 7]]})
    return verify_model(read_export(demo_export), ["onnxruntime", "nope"], request, options)


def test_a_verification_and_what_it_holds(verification: Any, demo_export: Path) -> None:
    result = verification.results[0]
    for each in (verification, result, result.comparison, result.run, read_export(demo_export)):
        assert isinstance(each, Shown)
        assert 20 < len(repr(each)) < LONGEST
        assert "array(" not in repr(each)
        assert "\n" not in repr(each)
    assert "onnxruntime: PASSED" in repr(verification)
    assert "nope: ERROR: " in repr(verification)


def test_models_and_results_of_generate(demo_checkpoint: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(demo_checkpoint, proxy="split")
    assert f"{demo_checkpoint} (gpt2, float32), proxy: split" in repr(model)
    assert repr(EmbeddingResult(np.zeros((3, 500)))) == ("<EmbeddingResult embeddings: 3 of 500>")


def test_the_html_of_a_hostile_name() -> None:
    class Result(Shown):
        def facts(self) -> dict[str, Any]:
            return {"model": "<script>x</script>", "nothing": None, "long": "y" * 900}

    html = Result()._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "nothing" not in html
    assert len(html) < LONGEST
