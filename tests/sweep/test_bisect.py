"""The package and the layer at which a cell turned: from ledgers, and by runs in between."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main
from qeff_proxy.sweep import Ledger
from qeff_proxy.sweep.ledger import Divergence, Night, Record

pytestmark = pytest.mark.one_home

CELL = "llama/toy/short/ids"
PLAN = """
[models]
llama = "checkpoint"
[backends.toy]
[settings.short]
max_new_tokens = 2
[inputs.ids]
ids = [[5, 17, 29, 41, 53]]
"""
PACKAGES = ("alpha", "toy-sdk")


def wheel(folder: Path, name: str, version: str, code: str) -> None:
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}.py", code)
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, toys: Path, make_model: Any) -> Iterator[Path]:
    """A plan whose backend goes wrong in layer 3 with toy-sdk 2.0; wheels and lock files."""
    folder = tmp_path_factory.mktemp("bisect")
    make_model("llama", layers=5).save_pretrained(folder / "checkpoint")
    (folder / "plan.toml").write_text(PLAN)
    for version, layer in (("1.0", "None"), ("2.0", "3")):
        for name in PACKAGES:
            wheel(folder, name, version, f"LAYER = {layer}\n")
        pins = "".join(f"{name}=={version}\n" for name in PACKAGES)
        (folder / f"{version}.txt").write_text(f"# made by a test\n{pins}same==1.0\n")
    backend = toys / "toy_backend.py"
    code = backend.read_text()
    backend.write_text(code.replace("LAYER = None", "from toy_sdk import LAYER"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(folder / "home"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield folder / "plan.toml"
    backend.write_text(code)


def test_lock_files_are_bisected_to_one_package(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locks = [str(plan.parent / f"{version}.txt") for version in ("1.0", "2.0")]
    assert main(["sweep", "bisect", str(plan), CELL, "--locks", *locks, "--json"]) == 1
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert turn["versions"] == {"toy-sdk": ["1.0", "2.0"]}
    assert (turn["name"], turn["at"], turn["runs"]) == (CELL, "body layer 3", 3)
    assert "its values first moved at body.out.hidden_states.layer-03" in turn["what"]
    records = list(Ledger(plan.parent / "bisect.jsonl").new_records())
    assert sorted(record.verdict for record in records) == ["failed", "passed", "passed"]
    assert not (plan.parent / "ledger.jsonl").exists()


def test_interpreters_are_compared(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pythons = []
    for version in ("1.0", "2.0"):
        folder = tmp_path / version
        with zipfile.ZipFile(plan.parent / f"toy_sdk-{version}-py3-none-any.whl") as file:
            file.extractall(folder)
        python = tmp_path / f"python-{version}"
        python.write_text(
            f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        pythons.append(str(python))
    assert main(["sweep", "bisect", str(plan), CELL, "--python", *pythons]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{CELL} turned at body layer 3, in 2 runs"
    assert said[2] == "  by toy-sdk 1.0 → 2.0"
    for words, error in (
        (reversed(pythons), "does not pass with"),
        (["no-such-python"] * 2, "no-such-python cannot be run: No such file"),
    ):
        assert main(["sweep", "bisect", str(plan), CELL, "--python", *words]) == 2
        assert error in capsys.readouterr().err


History = Callable[..., Path]


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Writes a ledger of nights: a verdict and versions each."""

    def write(*nights: tuple[str, dict[str, str]], name: str = "ledger.jsonl") -> Path:
        ledger = Ledger(tmp_path / name)
        for place, (verdict, versions) in enumerate(nights):
            first = Divergence("body", "body.out.x.layer-02", 2, "prefill-0000")
            record = Record(
                id=f"{name}{place}",
                name=CELL,
                night=f"n{place}",
                time=f"2026-01-{place + 1:02}T00:00:00Z",
                verdict=verdict,  # type: ignore[arg-type]
                versions=versions,
                divergence=first if verdict == "failed" else None,
            )
            ledger.append(record)
        return ledger.path

    return write


def test_a_ledger_names_the_versions_that_never_passed(
    history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    path = history(
        ("passed", {"torch": "1", "sdk": "7"}),
        ("passed", {"torch": "2", "sdk": "7"}),
        ("passed", {"torch": "1", "sdk": "7"}),
        ("failed", {"torch": "2", "sdk": "8"}),
        ("failed", {"torch": "3", "sdk": "8"}),
    )
    assert main(["sweep", "bisect", str(path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{CELL} turned at body layer 2, between n2 and n3"
    assert said[2:] == ["  by sdk 7 → 8"]
    assert main(["sweep", "bisect", str(path), "--only", "other*"]) == 0
    assert "no cell turned" in capsys.readouterr().out


def test_a_cell_whose_last_night_is_one_that_passed_has_not_turned(
    history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings were changed and changed back, so that it did not run again."""
    path = history(("passed", {"sdk": "7"}), ("failed", {"sdk": "7"}))
    for night, identity in (("n0", 0), ("n1", 1)):
        Ledger(path).append_night(Night(night, "plan.toml", {CELL: f"{path.name}{identity}"}))
    assert main(["sweep", "bisect", str(path)]) == 1
    Ledger(path).append_night(Night("n2", "plan.toml", {CELL: f"{path.name}0"}))
    capsys.readouterr()
    assert main(["sweep", "bisect", str(path)]) == 0
    assert "no cell turned" in capsys.readouterr().out


def test_two_ledgers_are_one_history(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    one = history(("passed", {"torch": "1", "sdk": "7"}), name="a.jsonl")
    two = history(("failed", {"torch": "2", "sdk": "8"}), name="b.jsonl")
    assert main(["sweep", "bisect", str(one), str(two)]) == 1
    said = capsys.readouterr().out
    assert "by sdk 7 → 8 or torch 1 → 2" in said
    assert "one of them: sweep bisect PLAN CELL --locks OLD NEW" in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["none.jsonl"], "there is no ledger none.jsonl"),
        ([], "takes a ledger or two"),
        (["plan.toml", "cell"], "With a plan and a cell, give --python or --locks"),
        (["plan.toml", "cell", "--locks", "a.txt", "b.txt"], "a.txt cannot be read"),
        (["plan.toml", "--python", "a", "b"], "takes a plan and a cell"),
        (["plan.toml", "cell", "--python", "a"], "--python names one environment"),
        (["a.jsonl", "--workers", "2"], "--workers has no use for bisect"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "bisect", *words]) == 2
    assert error in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
