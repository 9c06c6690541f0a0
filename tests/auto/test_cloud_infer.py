"""QEfficient's program ``cloud.infer``, as its README calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.cloud import export
from qeff_proxy.cloud.infer import main as infer

FLAGS = ["--num_cores", "2", "--device_group", "[0]", "--mxfp6", "--mos", "1"]


def test_it_says_what_generate_says(demo_export: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--prefill-seq-len", "8", "--ctx-len", "32", "--max-new-tokens", "3"]
    assert main(["generate", str(demo_export), "Anna", "-- One", "Day", *options]) == 0
    expected = capsys.readouterr().out
    (tmp_path / "more.txt").write_text("Day\n\n")
    sizes = ["--prompt_len", "8", "--ctx-len", "32", "--generation_len", "3", "--batch_size", "1"]
    prompts = ["--prompt", "Anna|-- One", "--prompts_txt_file_path", str(tmp_path / "more.txt")]
    assert infer(["--model_name", str(demo_export), *prompts, *sizes, *FLAGS]) == 0
    said = capsys.readouterr()
    assert said.out == expected
    ignored = "qeff-proxy: warning: ignored, as they are for Cloud AI 100: "
    assert said.err.startswith(f"{ignored}--device_group, --mxfp6, --mos\n")


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        ([], "there is no prompt", 2),
        (["--prompt", "a", "--image_url", "b"], "--image_url cannot be obeyed", 2),
        (["--prompts_txt_file_path", "/nope"], "/nope", 7),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, code: int, capsys: Any) -> None:
    assert infer(["--model-name", "m", *arguments]) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_the_other_programs_say_what_there_is() -> None:
    with pytest.raises(ImportError, match="qeff-proxy export MODEL exports"):
        export.get_onnx_path_and_setup_customIO  # noqa: B018 (to look it up is what raises)
