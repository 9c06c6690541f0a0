"""What an export replaces is what an export wrote; what an interrupted one left is recovered."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.artifact.check_target import check_place
from qeff_proxy.artifact.export_folder import find_export, read_export
from qeff_proxy.cli import main
from qeff_proxy.common import atomic_folder as staging
from qeff_proxy.common.atomic_folder import locked, staged_folder
from qeff_proxy.errors import ArtifactError
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model
from qeff_proxy.plugins.manager import Plugins

HOOKS = Plugins.discover().hooks_for("gpt2")


@pytest.fixture
def target(demo_export: Path, tmp_path: Path) -> Path:
    """An export with a dump, which a test may damage."""
    folder = tmp_path / "o"
    shutil.copytree(demo_export, folder, ignore=shutil.ignore_patterns("compiled", "io"))
    (folder / "io" / "old-run").mkdir(parents=True)
    return folder


def replace_until(target: Path, stop: Callable[[], None], when: str, count: int = 1) -> None:
    """Replace the folder by a copy of itself, in a child that stops as it comes to a step.

    Args:
        target: The folder.
        stop: What happens then.
        when: Name of a function of `pathlib.Path` or `qeff_proxy.common.atomic_folder`.
        count: At which call of it.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    owner: Any = staging if hasattr(staging, when) else Path
    original = getattr(owner, when)
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            stop()
        return original(*arguments)

    try:
        with locked(target), staged_folder(target, "export.json", ("io",)) as folder:
            shutil.copytree(target, folder, ignore=shutil.ignore_patterns("io"), dirs_exist_ok=True)
            setattr(owner, when, counted)
    finally:
        os._exit(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


#: Where the exchange can stop: before its second rename, or as the new folder takes over.
STOPS = [(kill, "rename", 2), (interrupt, "rename", 2), (kill, "_take_over", 1)]
STOPS += [(interrupt, "_take_over", 1), (kill, "rename", 3)]


@pytest.mark.parametrize(("stop", "when", "count"), STOPS)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_reader_finds_export_and_dumps_after_an_interruption(
    target: Path, stop: Callable[[], None], when: str, count: int
) -> None:
    replace_until(target, stop, when, count)
    assert find_export(target) is not None
    assert (target / "io" / "old-run").is_dir()
    assert [path.name for path in target.parent.iterdir() if ".old" in path.name] == []


def test_a_lookup_clears_what_a_killed_export_left(saved_gpt2: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    checkpoint = shutil.copytree(saved_gpt2, tmp_path / "checkpoint")
    for _ in range(2):
        made = export_model(load_model(str(checkpoint)), HOOKS, output=target, weights="reference")
        (tmp_path / ".o.partial-0123456789ab").mkdir(exist_ok=True)
        (tmp_path / ".o.old" / "io" / "old-run").mkdir(parents=True, exist_ok=True)
    made = export_model(load_model(str(checkpoint)), HOOKS, output=target, weights="reference")
    assert (target / "io" / "old-run").is_dir()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".o.p", ".o.old"))]
    assert "model.safetensors" in made.files  # linked, and so the export's own
    check_place(target)


def test_dumps_of_both_folders_are_kept(target: Path) -> None:
    older = target.parent / ".o.old"
    for name in ("older-run", "old-run"):
        (older / "io" / name).mkdir(parents=True)
    (older / "io" / "old-run" / "note").write_text("of the older folder")
    read_export(target)
    assert sorted(path.name for path in (target / "io").iterdir()) == [
        "old-run",
        "old-run-2",
        "older-run",
    ]
    assert (target / "io" / "old-run-2" / "note").is_file()
    assert not older.exists()


def test_what_a_living_run_set_aside_is_left_to_it(target: Path) -> None:
    older = target.parent / ".o.old"
    (older / "io" / "older-run").mkdir(parents=True)
    with locked(target):
        read_export(target)
    assert (older / "io" / "older-run").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "mine.safetensors",
        "mine.onnx",
        "notes.txt",
        "processor/notes.txt",
        "processor/mine/x",
        "compiled/notes.txt",
    ],
)
def test_a_file_that_the_export_did_not_write_is_named(target: Path, name: str) -> None:
    path = target / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ArtifactError, match=f"also holds {name.removesuffix('/x')}"):
        check_place(target)


def test_what_an_export_wrote_may_be_replaced(target: Path) -> None:
    (target / "compiled" / "onnxruntime-0123456789ab").mkdir(parents=True)
    (target / "compiled" / ".onnxruntime-0123456789ab.lock").touch()
    check_place(target)


def test_nothing_is_replaced_where_the_manifest_says_nothing(target: Path) -> None:
    (target / "export.json").write_text("{}")
    with pytest.raises(ArtifactError, match="nothing says which files beside it may be replaced"):
        check_place(target)


def test_a_manifest_that_is_wrong_elsewhere_still_says_what_may_be_replaced(target: Path) -> None:
    manifest = json.loads((target / "export.json").read_text())
    (target / "export.json").write_text(json.dumps({**manifest, "kind": "nope"}))
    check_place(target)


def test_a_place_within_an_export_is_refused(
    target: Path, demo_checkpoint: Path, capsys: Any
) -> None:
    for place in ("x", "io/x"):
        command = ["export", str(demo_checkpoint), "--output", str(target / place)]
        assert main(command) == 7
        assert f"lies in the export {target}" in capsys.readouterr().err
        assert not (target / place).exists()


def test_a_place_that_takes_no_files_is_not_said_to_be_in_use() -> None:
    with pytest.raises(ArtifactError, match="cannot write /proc"), locked(Path("/proc/x")):
        pass


def test_a_dump_is_kept_in_an_export_only_below_io(target: Path, capsys: Any) -> None:
    for place in (target, target / "x", target / "processor" / "x", target / "io"):
        command = ["generate", str(target), "--ids", "5,6", "--max-new-tokens", "1"]
        assert main([*command, "--io-dir", str(place)]) == 9
        assert "where no dump can be kept" in capsys.readouterr().err
    assert main([*command, "--io-dir", str(target / "io" / "mine")]) == 0
    assert main(["verify", str(target), "--ids", "5,6", "--io-dir", str(target)]) == 9
    assert {path.name for path in (target / "io").iterdir()} == {"old-run", "mine"}


def test_the_next_run_clears_what_killed_ones_left_in_the_export(target: Path, capsys: Any) -> None:
    (target / "io" / "20260101T000000-abcdef.incomplete-abcdefgh" / "decode").mkdir(parents=True)
    command = ["generate", str(target), "--ids", "5,6", "--max-new-tokens", "1", "--write-io"]
    assert main([*command, "--json"]) == 0
    names = [path.name for path in (target / "io").iterdir()]
    assert len(names) == 2
    assert not any("incomplete" in name for name in names), capsys.readouterr()


def test_a_full_disk_while_compiling_is_said(target: Path, forked: Callable[..., Any]) -> None:
    def run() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
        return main(["compile", str(target)])

    done = forked(run)
    assert done.returncode == 7
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in (target / "compiled").iterdir() if path.is_dir()] == []


def test_compiled_files_that_were_damaged_unseen_say_what_to_do(target: Path, capsys: Any) -> None:
    assert main(["compile", str(target)]) == 0
    (path,) = (target / "compiled").glob("*/body.onnx")
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert main(["generate", str(target), "--ids", "5,6", "--max-new-tokens", "1"]) == 8
    assert "compile again (qeff-proxy compile --force)" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:the files in .* are not what was compiled:UserWarning")
def test_verify_compiles_damaged_files_again(target: Path, capsys: Any) -> None:
    """One bit of a compiled weight, with the file's size and times as they were."""
    assert main(["compile", str(target)]) == 0
    (path,) = (target / "compiled").glob("*/body.data")
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 3] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert main(["verify", str(target), "--ids", "5,6", "--max-new-tokens", "1"]) == 0
    assert "are not what was compiled: they are compiled again" in capsys.readouterr().err
    data[len(data) // 2 + 3] ^= 0x40
    assert path.read_bytes() == data
