"""An ``export.json`` that somebody edited is refused, with the field, or it means what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.cli import main
from qeff_proxy.errors import ArtifactError

DELETED = object()


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets the field at a path, or deletes it."""

    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for step in path[:-1]:
            place = place[step]
        if value is DELETED:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return edit


def swap_parts(manifest: dict[str, Any]) -> None:
    manifest["parts"].reverse()


def duplicate_a_part(manifest: dict[str, Any]) -> None:
    manifest["parts"].append(manifest["parts"][0])


EDITS = [
    *((put("model", value=value), "'model'") for value in (None, 3, "x", [], {})),
    (put("model", "model_type", value=DELETED), "'model_type'"),
    *((put("settings", value=value), "'settings'") for value in (None, 3, "x", [])),
    *((put("made_by", value=value), "'made_by'") for value in (None, 3, "x", [])),
    *((put("flow", value=value), "'flow'") for value in ([], {}, "", None)),
    *((put("kind", value=value), "'kind'") for value in ("nope", [], "stub")),
    *((put("dtype", value=value), "'dtype'") for value in ("nope", 3, "float16")),
    *((put("cut", value=value), "'cut'") for value in (None, "x", {"verified": 3})),
    (put("parts", value=[]), "'parts' of the document: expected 'array' of length >= 1"),
    (put("parts", value={}), "'parts' of the document: expected 'array', got 'object'"),
    (swap_parts, "'parts' has lm_head before body"),
    (duplicate_a_part, "'name' of 'parts' has 'embedding' twice"),
    *((put("parts", n, value=DELETED), "'parts' and 'graphs' of 'cut'") for n in range(3)),
    *((put("parts", 0, "name", value=value), "'name' of 'parts'[0]") for value in (None, 3, [])),
    *(
        (put("parts", 0, "file", value=value), "'file' of 'parts'[0] of the document")
        for value in ("../x", "", ".", "..", "a\0b", 3)
    ),
    (
        put("parts", 1, "outputs", value=[]),
        "'outputs' of 'parts'[1] of the document: expected 'array' of length >= 1",
    ),
    (put("parts", 1, "masks", 0, "size", value="x"), "'size'"),
    (put("parts", 1, "masks", 0, "kind", value="nope"), "'kind'"),
    (put("parts", 1, "masks", 0, "name", value="nope"), "'masks' of the body part"),
    (put("parts", 1, "weights", value="other.safetensors"), "'weights' of the body part"),
    (put("parts", 1, "weights", value="vocabulary.safetensors"), "'weights' of the body part"),
    (put("hashes", value={}), "'files' and 'hashes'"),
    (put("files", value={}), "'files' and 'hashes'"),
    (put("hashes", "body.safetensors", value="x"), "'body.safetensors' of 'hashes'"),
    (put("processor", value=3), "'processor'"),
    *((put("settings", "taps", value=value), "'taps'") for value in (3, [3], ["nope"], ["mlp"])),
    (put("settings", "embedding_rows", value="x"), "'embedding_rows' of 'settings'"),
    (put("schema", value=2), "schema 2, not 1"),
    (put("surprise", value=1), "unknown 'surprise'"),
]


@pytest.fixture(scope="module")
def copied(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the export whose manifest the tests edit in turn."""
    folder = tmp_path_factory.mktemp("edited") / "export"
    shutil.copytree(demo_export, folder, ignore=shutil.ignore_patterns("compiled", "io"))
    return folder


@pytest.mark.parametrize(("edit", "words"), EDITS)
def test_an_edit_is_refused_with_the_field(
    edit: Callable[[dict[str, Any]], None], words: str, copied: Path, demo_export: Path
) -> None:
    manifest = json.loads((demo_export / "export.json").read_text())
    edit(manifest)
    (copied / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError) as caught:
        read_export(copied)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{copied / 'export.json'} is damaged: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"schema": 1, "schema": 1}', "[" * 9999])
def test_no_json_object_is_refused(text: str, copied: Path) -> None:
    (copied / "export.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"export\.json is damaged"):
        read_export(copied)


def test_what_was_written_is_read_as_it_was(demo_export: Path) -> None:
    export = read_export(demo_export)
    assert export.to_json() == json.loads((demo_export / "export.json").read_text())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            put("parts", 1, "outputs", 2, "name", value="present.0.valuex"),
            "export.json names present.0.valuex, which the graph of the body part does not have",
        ),
        (
            put("parts", 1, "outputs", 0, "shape", 1, value="queryx"),
            "the axis 'queryx' of last_hidden_state in export.json is an axis of no input",
        ),
    ],
)
def test_an_edit_that_the_graphs_contradict_is_refused_when_they_run(
    edit: Callable[[dict[str, Any]], None],
    words: str,
    copied: Path,
    demo_export: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = json.loads((demo_export / "export.json").read_text())
    shutil.copytree(demo_export, copied, dirs_exist_ok=True)
    assert main(["compile", str(copied)]) == 0
    edit(manifest)
    (copied / "export.json").write_text(json.dumps(manifest))
    assert main(["generate", str(copied), "Hi", "--max-new-tokens", "2"]) == 7
    assert words in capsys.readouterr().err
