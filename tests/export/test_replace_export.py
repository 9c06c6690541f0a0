"""An export replaces an older one as a whole, nothing else, and is of the checkpoint it names."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from qeff_proxy.artifact.export_folder import read_export
from qeff_proxy.common import atomic_folder
from qeff_proxy.errors import ArtifactError, CheckpointError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins

HOOKS = Plugins.discover().hooks_for("gpt2")


def test_an_older_export_and_its_dumps_survive_a_failed_and_a_forced_one(
    saved_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    export_model(load_model(str(saved_gpt2)), HOOKS, output=target)
    (target / "io" / "run").mkdir(parents=True)
    before = (target / "export.json").read_bytes()
    broken = load_model(str(saved_gpt2))
    broken.model.transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(Exception, match="NaN"):
        export_model(broken, HOOKS, output=target, force=True)
    assert (target / "export.json").read_bytes() == before
    export_model(load_model(str(saved_gpt2)), HOOKS, output=target, force=True)
    assert (target / "io" / "run").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["home", "out"] or (
        sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]
    )


def test_a_folder_of_something_else_is_not_replaced(saved_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty and holds no export"):
        export_model(load_model(str(saved_gpt2)), HOOKS, output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_folder_in_use_by_another_run_is_refused(saved_gpt2: Path, tmp_path: Path) -> None:
    from qeff_proxy.common.atomic_folder import locked

    with (
        locked(tmp_path / "out"),
        pytest.raises(ArtifactError, match="in use by another run"),
    ):
        export_model(load_model(str(saved_gpt2)), HOOKS, output=tmp_path / "out", wait=False)


def test_a_second_run_waits_for_the_first_and_takes_its_export(
    saved_gpt2: Path, tmp_path: Path
) -> None:
    from qeff_proxy.common.atomic_folder import locked

    loaded, stages = load_model(str(saved_gpt2)), []
    made = export_model(loaded, HOOKS, output=tmp_path / "made")
    lock = ExitStack()
    lock.enter_context(locked(tmp_path / "out"))

    def finish_the_first(stage: str) -> None:
        stages.append(stage)
        made.folder.rename(tmp_path / "out")
        lock.close()

    again = export_model(loaded, HOOKS, output=tmp_path / "out", progress=finish_the_first)
    assert stages == ["waiting for another run to finish this export"]
    assert again.parts == made.parts


def test_what_killed_exports_of_other_models_left_is_removed(saved_gpt2: Path, home: Path) -> None:
    left = home / ".gone-0123456789abcdef.partial-0123456789ab"
    others = home / ".config.old", home / ".mine.partial-0123456789ab"
    for folder in (left, *others):
        folder.mkdir(parents=True)
    export_model(load_model(str(saved_gpt2)), HOOKS)
    assert not left.exists()
    assert all(folder.is_dir() for folder in others)


def test_ctrl_c_while_a_folder_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_folder, "_hold", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_folder.replaced_folder(atomic_folder.HIDDEN, tmp_path / "out"),
    ):
        pytest.fail("it was made")
    assert not [path for path in tmp_path.iterdir() if path.name != "home"]


def test_an_interrupted_exchange_loses_no_dump(tmp_path: Path) -> None:
    """As it is when a process is killed after the new folder stands and before it took over."""
    from qeff_proxy.common.atomic_folder import recover_folder

    old, new = tmp_path / ".out.old", tmp_path / "out"
    (old / "io" / "run").mkdir(parents=True)
    (old / "export.json").write_text("{}")
    new.mkdir()
    recover_folder(new, ("io",))
    assert (new / "io" / "run").is_dir()
    assert not old.exists()


def test_a_link_to_a_folder_stays_a_link(saved_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for kind in ("split", "whole"):
        export_model(load_model(str(saved_gpt2)), HOOKS, kind, output=tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert read_export(tmp_path / "link").kind == "whole"


def test_another_models_export_and_foreign_files_are_not_replaced(
    saved_gpt2: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    export_model(load_model(str(saved_gpt2)), HOOKS, "split", output=target)
    with pytest.raises(ArtifactError, match="holds another export"):
        export_model(load_model(str(saved_gpt2)), HOOKS, "whole", output=target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"also holds notes\.txt"):
        export_model(load_model(str(saved_gpt2)), HOOKS, "whole", output=target, force=True)
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("read_early", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_checkpoint_that_changes_after_it_was_loaded_is_refused(
    name: str, read_early: bool, saved_gpt2: Path, home: Path, tmp_path: Path
) -> None:
    """Else the cache holds another model's export under this one's identity."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved_gpt2, checkpoint)
    loaded = load_model(str(checkpoint))
    if read_early:
        assert loaded.model is not None
    changed = (
        (checkpoint / name).read_bytes().replace(b"transformers_version", b"transformers_versiom")
    )
    if name.endswith(".safetensors"):
        changed = changed[:-4] + b"\0\0\0\0"
    (tmp_path / "new").write_bytes(changed)
    (tmp_path / "new").replace(checkpoint / name)
    with pytest.raises(CheckpointError, match="have changed since the model was loaded"):
        export_model(loaded, HOOKS)
    assert not list(home.rglob("export.json"))


def test_a_checkpoint_that_changes_before_its_weights_are_read_is_refused(
    saved_gpt2: Path, tmp_path: Path
) -> None:
    """Also if it has changed back when the export is written."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved_gpt2, checkpoint)
    loaded = load_model(str(checkpoint))
    (checkpoint / "model.safetensors").rename(tmp_path / "kept")
    (checkpoint / "model.safetensors").write_bytes((tmp_path / "kept").read_bytes())
    with pytest.raises(CheckpointError, match="have changed since the model was loaded"):
        _ = loaded.model


def test_an_export_may_lie_in_the_checkpoints_folder(saved_gpt2: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved_gpt2, checkpoint)
    first = export_model(load_model(str(checkpoint)), HOOKS, output=checkpoint / "export")
    again = load_model(str(checkpoint))
    assert export_model(again, HOOKS, output=checkpoint / "export").made_by == first.made_by
