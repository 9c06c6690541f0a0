"""A damaged tokenizer is a fault of the checkpoint, which is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.load_processor import load_processor


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"model": {', '"model": {"type": "Nope",', 1),
        lambda text: text.replace('"vocab"', '"words"', 1),
        lambda text: text.replace('"merges": [', '"merges": [7,', 1),
        lambda text: text.replace('"added_tokens": [', '"added_tokens": [[],', 1),
        lambda text: "[" * 100_000,
        lambda _text: "[]",
        lambda _text: "null",
    ],
)
def test_a_damaged_tokenizer(
    damage: Callable[[str], str], demo_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(CheckpointError, match="no tokenizer that can be loaded") as caught:
        load_processor(folder)
    assert "tokenizer.json" in str(caught.value)
