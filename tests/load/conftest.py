"""Base models of adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for what the tests here share


@pytest.fixture(scope="session")
def bases(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Llama with an untied head and of a GPT-2, of six layers each."""
    root = tmp_path_factory.mktemp("bases")
    make_model("llama", layers=6, tie_word_embeddings=False).save_pretrained(root / "llama")
    make_model("gpt2", layers=6).save_pretrained(root / "gpt2")
    return {name: root / name for name in ("llama", "gpt2")}
