"""A checkpoint that is loaded with the class of another task: the error names its own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import qeff_proxy
import qeff_proxy_audio
import qeff_proxy_vision
from qeff_proxy.errors import CheckpointError, UnsupportedModelError
from qeff_proxy.load.tasks import CUT_OPTIONS, TASKS, UNUSED_WEIGHTS


def checkpoint(package: ModuleType, name: str) -> Path:
    assert package.__file__ is not None
    return Path(package.__file__).parent / "checkpoints" / name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    bert, classes, t5 = (tmp_path_factory.mktemp(name) for name in ("bert", "classes", "t5"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=16, **sizes)
    BertModel(config).save_pretrained(bert)
    BertForSequenceClassification(config).save_pretrained(classes)
    small = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(t5)
    return {
        "bert": bert,
        "classes": classes,
        "t5": t5,
        "gpt2": checkpoint(qeff_proxy, "tiny-gpt2"),
        "whisper": checkpoint(qeff_proxy_audio, "tiny-whisper"),
        "wav2vec2": checkpoint(qeff_proxy_audio, "tiny-wav2vec2"),
        "llava": checkpoint(qeff_proxy_vision, "tiny-llava"),
    }


@pytest.mark.parametrize(
    ("task", "kind", "architecture", "right"),
    [
        ("text", "bert", "BertModel", "QEFFAutoModel"),
        ("text", "whisper", "WhisperForConditionalGeneration", "QEFFAutoModelForSpeechSeq2Seq"),
        ("text", "t5", "T5ForConditionalGeneration", "QEFFAutoModelForSeq2SeqLM"),
        (
            "speech",
            "classes",
            "BertForSequenceClassification",
            "QEFFAutoModelForSequenceClassification",
        ),
        ("text", "wav2vec2", "Wav2Vec2ForCTC", "QEFFAutoModelForCTC"),
        ("speech", "gpt2", "GPT2LMHeadModel", "QEFFAutoModelForCausalLM"),
        (
            "embedding",
            "llava",
            "LlavaForConditionalGeneration",
            "QEFFAutoModelForImageTextToText",
        ),
        ("embedding", "gpt2", "GPT2LMHeadModel", "QEFFAutoModelForCausalLM"),
    ],
)
def test_the_right_class_is_named(
    task: str, kind: str, architecture: str, right: str, checkpoints: dict[str, Path]
) -> None:
    asked = TASKS[task].face
    model = getattr(qeff_proxy, asked).from_pretrained(checkpoints[kind], enable_proxy=True)
    wanted = rf"is a {architecture}, which {asked} is not for \(.*\)\. Load it with {right}\.$"
    with pytest.raises(UnsupportedModelError, match=wanted):
        model.export()


def test_what_is_wrong_with_a_checkpoint_of_this_task_is_said_as_it_is(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(checkpoints["bert"], tmp_path / "bert")
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    model = qeff_proxy.QEFFAutoModel.from_pretrained(copy, enable_proxy=True)
    with pytest.raises(CheckpointError, match="lacks 1 of the weights"):
        model.export()


def test_no_class_is_named_where_none_serves(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(intermediate_size=16, **sizes)).save_pretrained(tmp_path)
    model = qeff_proxy.QEFFAutoModelForCausalLM.from_pretrained(tmp_path, enable_proxy=True)
    with pytest.raises(UnsupportedModelError) as caught:
        model.export()
    assert "Load it with" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.face)
def test_a_fact_of_a_task_stands_in_one_place(task: object) -> None:
    from qeff_proxy.load.tasks import Task

    assert isinstance(task, Task)
    assert getattr(qeff_proxy, task.face).task is task
    assert set(task.options) <= set(CUT_OPTIONS)
    assert set(task.unused) <= set(UNUSED_WEIGHTS)
