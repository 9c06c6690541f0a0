"""QEfficient's ``utils``: a tokenizer, and the words about what is elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from qeff_proxy import utils
from qeff_proxy.errors import CheckpointError
from qeff_proxy.utils import load_hf_tokenizer
from transformers import AutoTokenizer


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    ours = load_hf_tokenizer(tmp_path, padding_side="left")
    assert ours.pad_token_id == tokenizer.eos_token_id
    assert ours("Anna")["input_ids"] == tokenizer("Anna")["input_ids"]
    rows = ours(["Anna went to", "Anna"], padding=True)["attention_mask"]
    assert [row[0] for row in rows] == [1, 0]
    assert load_hf_tokenizer(demo_checkpoint).padding_side == "right"


def test_a_folder_without_a_tokenizer_is_named(demo_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="gives no tokenizer"):
        load_hf_tokenizer(tmp_path / "none")


def test_a_name_that_is_elsewhere_says_where() -> None:
    from qeff_proxy.generation import cloud_infer
    from qeff_proxy.utils import test_utils

    with pytest.raises(ImportError, match=r"from qeff_proxy_vision\.qefficient import Intern"):
        test_utils.InternProcessor  # noqa: B018 (to look it up is what raises)
    with pytest.raises(ImportError, match="cloud_ai_100_exec_kv run what compile made"):
        cloud_infer.QAICInferenceSession  # noqa: B018
    assert not hasattr(test_utils, "other")


def test_what_scripts_import_from_modules_of_qefficient() -> None:
    from qeff_proxy import cloud_ai_100_exec_kv
    from qeff_proxy.cloud import export
    from qeff_proxy.generation import text_generation_inference
    from qeff_proxy.utils import constants
    from qeff_proxy.utils.logging_utils import logger

    assert list(constants.Constants.INPUT_STR) == ["My name is"]
    assert logger.name == "qeff_proxy"
    assert text_generation_inference.cloud_ai_100_exec_kv is cloud_ai_100_exec_kv
    for module, name in (
        (text_generation_inference, "fix_prompts"),
        (constants, "ONNX_EXPORT_OPSET"),
        (utils, "get_qpc_dir_path"),
        (export, "get_onnx_path_and_setup_customIO"),
    ):
        with pytest.raises(ImportError, match=f"^there is no {module.__name__}.{name}: "):
            getattr(module, name)
        assert not hasattr(module, "__wrapped__")
