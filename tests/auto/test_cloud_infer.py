"""QEfficient's programs of ``cloud``, as its README calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.cloud import compile as compilation
from qeff_proxy.cloud import execute, export, finetune
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
        (["--prompt", "a", "--generation_len", "x"], "--max-new-tokens", 2),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, code: int, capsys: Any) -> None:
    assert infer(["--model-name", "m", *arguments]) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_what_export_and_compile_made_is_executed(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    model = ["--model_name", "no/such", "--local-model-dir", str(demo_checkpoint)]
    assert export.main([*model, "--cache_dir", "there", "--mxint8_kv_cache", "1"]) == 0
    said = capsys.readouterr()
    assert "ignored, as they are for Cloud AI 100: --mxint8_kv_cache\n" in said.err
    assert "--cache_dir is ignored: set HF_HUB_CACHE\n" in said.err
    folder = Path(said.out.splitlines()[-1])
    sizes = ["--prompt_len", "8", "--ctx_len", "32", "--qpc-path", "there"]
    assert compilation.main(["--onnx_path", str(folder / "body.onnx"), *sizes, *FLAGS]) == 0
    said = capsys.readouterr()
    assert "--qpc_path is ignored: what is compiled lies in the folder that is printed" in said.err
    compiled = said.out.splitlines()[-1]
    asked = ["--prompt", "Anna went|Leo", "--generation_len", "3", "--device_group", "[0]"]
    assert execute.main([*model, "--qpc_path", compiled, *asked]) == 0
    executed = capsys.readouterr().out
    options = ["--prefill-seq-len", "8", "--ctx-len", "32", "--max-new-tokens", "3"]
    assert main(["generate", str(folder), "Anna went", "Leo", *options]) == 0
    assert executed == capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "words", "code"),
    [
        (execute, ["--qpc_path", "/nope", "--prompt", "a"], "nothing that was compiled", 7),
        (execute, ["--qpc_path", "/nope"], "there is no prompt", 2),
        (execute, ["--qpc_path", "x", "--prompt", "a", "--generation_len", "1.5"], "'1.5'", 2),
        (compilation, ["--onnx_path", "/nope/body.onnx"], "/nope", 3),
        (compilation, ["--onnx_path", "x", "--full_batch_size", "4"], "cannot be obeyed", 2),
        (export, ["--model_name", "/nope"], "/nope", 3),
    ],
)
def test_programs_refuse_in_one_line(
    program: Any, arguments: list[str], words: str, code: int, capsys: Any
) -> None:
    assert program.main(arguments) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_the_other_programs_say_what_there_is(capsys: Any) -> None:
    assert finetune.main() == 2
    assert "there is no finetuning here" in capsys.readouterr().err
