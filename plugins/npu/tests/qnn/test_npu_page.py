"""The commands and the code of docs/npu.md do what the page says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qeff_proxy
from qeff_proxy.cli import main

if TYPE_CHECKING:
    import pytest

PAGE = (Path(__file__).parents[4] / "docs" / "npu.md").read_text(encoding="utf-8")
CHECKPOINT = Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"
HUB_ID = "openai-community/gpt2"  # stands for any model; the tests put in one that is here


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [block.replace(HUB_ID, str(CHECKPOINT)) for block in found]


def test_the_page_does_what_it_says(
    shared_home: Path, make_export: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_export("gpt2")  # the first command finds it there
    monkeypatch.setenv("QEFF_HOME", str(shared_home))
    # Those of quantization, which come last, are run with all pages' (tests/docs).
    commands = [block for block in blocks("bash") if block.startswith("qeff-proxy")][:3]
    outputs = []
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().out
        outputs.append(capsys.readouterr().out)
    backends, verified, compiled = outputs
    assert "SM8650" in backends
    assert [line.split()[:2] for line in verified.splitlines()[1:] if "PASSED   " in line] == [
        ["onnxruntime", "PASSED"],
        ["qnn", "PASSED"],
    ]
    folder = Path(compiled.strip().splitlines()[-1])
    files = {path.name for path in folder.iterdir()}
    named = re.findall(r"`((?:body|embedding|lm_head)[\w.-]*\.(?:bin|onnx|json))`", PAGE)
    assert len(named) == 6
    assert files >= {name for name in named if ".host." not in name}
    (block,) = blocks("python")
    exec(compile(block, "docs/npu.md", "exec"), {})
    (text,) = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert text.strip()


def test_the_page_names_the_lengths_that_nobody_said() -> None:
    from qeff_proxy.backends.lengths import with_fixed_shapes
    from qeff_proxy.compile_options import CompileOptions

    chosen = with_fixed_shapes(CompileOptions())
    assert f"({chosen.prefill_seq_len} unless said)" in PAGE
    assert f"({chosen.ctx_len} unless said)" in " ".join(PAGE.split())
