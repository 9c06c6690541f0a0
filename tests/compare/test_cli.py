"""The command as people run it: exit codes, tables, JSON."""

from __future__ import annotations

import json
import shutil

import pytest
from qeff_proxy.cli import main

pytestmark = pytest.mark.one_home


def test_dumps_that_agree_exit_with_0(good, capsys):
    assert main(["compare", str(good), str(good)]) == 0
    assert "PASSED: all of 12 tensors in 5 steps" in capsys.readouterr().out


def test_dumps_that_differ_exit_with_1_and_the_layer(good, bad, capsys):
    assert main(["compare", str(good), str(bad)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FAILED: of 12 tensors in 5 steps" in out
    assert "First divergence: layer 2, body.out.hidden_states.layer-02 in prefill-0000." in out
    assert "body.out.present_key.layer-02, passed" in out
    assert "from there: layer 2" in out


def test_the_tolerance_the_verdict_proposes_is_enough(good, bad, tmp_path, capsys):
    """Following the advice tensor after tensor ends in a pass."""
    options: list[str] = []
    for _ in range(40):
        capsys.readouterr()
        if main(["compare", str(good), str(bad), *options]) == 0:
            break
        out = " ".join(capsys.readouterr().out.split())
        options += ["--tol", out.split("--tol '")[1].split("'")[0]]
    assert "PASSED" in capsys.readouterr().out
    assert options


def test_json_is_one_document(good, bad, capsys):
    assert main(["compare", str(good), str(bad), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["first_divergence"]["layer"] == 2
    assert len(value["tensors"]) == 24


def test_options_reach_the_comparison(good, bad, capsys):
    assert main(["compare", str(good), str(bad), "--tol", "*=peak:1"]) == 0
    assert main(["compare", str(good), str(bad), "--tensors", "*.layer-00"]) == 0
    assert main(["compare", str(good), str(bad), "--all"]) == 1
    assert "more (--all shows them)" not in capsys.readouterr().out.split("FAILED: of")[-1]
    assert main(["compare", str(good), str(bad), "--tol", "nonsense"]) == 2


def test_another_number_of_steps_is_said(good, stack, tmp_path, capsys):
    longer = str(stack(tmp_path / "c", steps=5))
    assert main(["compare", str(good), longer]) == 1
    out = capsys.readouterr().out
    assert "Problem: only the candidate has 1 step (decode-0004)." in out
    assert "pass --partial" in out
    assert main(["compare", str(good), longer, "--partial"]) == 0


def test_bad_input_exits_with_9_and_one_line(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path / "incomplete")
    (tmp_path / "incomplete" / "manifest.json").unlink()
    for other in ("nothing", "incomplete"):
        assert main(["compare", str(good), str(tmp_path / other)]) == 9
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert main(["compare", str(good), str(good), "--tensors", "head.*"]) == 9
    assert main(["compare", str(good), str(good), "--html", str(tmp_path / "no" / "r.html")]) == 9


@pytest.mark.parametrize("model", ["[bold]x[/]", "a\x1b[2Jb"])
def test_words_of_a_dump_are_not_obeyed(stack, tmp_path, capsys, model):
    dump = str(stack(tmp_path / "c", model=model))
    assert main(["compare", dump, dump]) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "[bold]x[/]" in out or "\\x1b[2J" in out


def test_a_tolerance_that_holds_nothing_is_a_mistake(good, capsys):
    assert main(["compare", str(good), str(good), "--tol", "nomatch=peak:1"]) == 2
    assert "the tolerance nomatch=peak:1 holds no tensor" in capsys.readouterr().err
