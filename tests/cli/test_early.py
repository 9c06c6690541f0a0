"""What is wrong with a command line is said before the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.cli.output import print_text
from qeff_proxy.errors import UsageError
from qeff_proxy.isolate import isolate_fault

from tests.cli.test_output import Terminal


@pytest.mark.parametrize("command", ["verify", "isolate"])
@pytest.mark.parametrize(
    ("place", "why"), [("none/page.html", "No such file"), ("folder.html", "Is a directory")]
)
def test_a_place_where_no_report_can_be(
    command: str,
    place: str,
    why: str,
    demo_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    (tmp_path / "folder.html").mkdir()
    assert main([command, str(demo_checkpoint), "--html", str(tmp_path / place)]) == 9
    said = capsys.readouterr().err
    assert f"{place} cannot be written: {why}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_a_report_may_go_to_what_is_no_file(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    code = main(["verify", str(demo_checkpoint), "--max-new-tokens", "1", "--html", "/dev/null"])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "there is no file"), (b"", "no capsule that"), (b"PK\3\4cut", "no capsule that")],
)
def test_a_capsule_that_is_not_there_or_cut_short(
    content: bytes | None, why: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "fault.zip"
    if content is not None:
        path.write_bytes(content)
    assert main(["isolate", str(path)]) == 7
    said = capsys.readouterr().err
    assert why in said
    assert str(path) in said


def test_a_layer_that_does_not_exist(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    stages: list[str] = []
    for number in ("9", "body layer 3"):
        with pytest.raises(UsageError, match=f"no layer '{number}'.* says 3 layers"):
            isolate_fault(demo_checkpoint, layer=number, progress=stages.append)
    assert stages == list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"no layer 'layer 1'.* body layer 0, body layer 1"):
        isolate_fault(demo_checkpoint, layer="layer 1", progress=stages.append)
    assert [stage for stage in stages if "PyTorch" in stage] == []


def test_a_recipe_without_a_precision(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'schema = 1\nsource = "m"\nidentity = "0"\nbackend = "onnxruntime"\nprecision = "int8"\n'
        'wide = ["transformer.h.0"]\n[measured]\n'
    )
    assert main(["verify", str(demo_checkpoint), "--recipe", str(recipe)]) == 2
    assert "a recipe says what stays float, and all weights do" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_long_line_is_folded_between_words_on_a_terminal(monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = "It is a group: " + ", ".join(f"MatMul node_MatMul_{number}" for number in range(9))
    command = "    qeff-proxy unpack " + " ".join(["folder"] * 20)
    for text, folded in ((line, True), (command, False), ("x" * 200, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        print_text(text)
        said = terminal.getvalue().removesuffix("\n")
        assert (said != text) == folded
        assert said.replace("\n", " ") == text
        if folded:
            assert max(map(len, said.splitlines())) <= 80
