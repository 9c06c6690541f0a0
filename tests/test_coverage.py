"""A tenth of docs/coverage.md: what the page says of these architectures still holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).parents[1]
Row = tuple[str, str, str]


def rows() -> list[Row]:
    """Mapping, model type and verdict of every tenth architecture that could be built."""
    found: list[Row] = []
    mapping = ""
    for line in (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## ([\w-]+):", line):
            mapping = heading[1]
        elif row := re.match(r"\| `([\w.-]+)` \| (equal|refused) \|", line):
            found.append((mapping, row[1], row[2]))
    return found[1::10]


ROWS = rows()


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The benchmark, as a module."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location("coverage_of_models", folder / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


class Measured:
    """What the page says is what is measured now; a class a worker."""

    @pytest.mark.filterwarnings("ignore")  # of models, about the sizes of small ones
    def test_the_page_is_right(self, coverage: ModuleType, row: Row) -> None:
        mapping, model_type, verdict = row
        if model_type not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
        assert coverage.verdict_of(mapping, model_type)[0] == verdict


def of(*mappings: str) -> pytest.MarkDecorator:
    """The rows of some mappings, each a test."""
    own = [row for row in ROWS if row[0] in mappings]
    return pytest.mark.parametrize("row", own, ids=["-".join(row[:2]) for row in own])


@of("causal")
class TestCausal(Measured):
    """Decoders."""


@of("encoder", "ctc", "masked-lm")
class TestEncoders(Measured):
    """Encoders of texts and sounds."""


@of("classification", "token-classification", "seq2seq", "speech")
class TestTexts(Measured):
    """Classifiers and encoder-decoders."""


@of("image-text", "sounds")
class TestImagesAndSounds(Measured):
    """Language models that take images or sounds."""


def test_each_row_is_in_a_class() -> None:
    assert len(ROWS) > 50
    assert {"causal", "encoder", "image-text", "speech", "seq2seq"} < {row[0] for row in ROWS}
