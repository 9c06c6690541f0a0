"""What a killed run left beside a dump's place is put back or cleared, a living run's is not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from qeff_proxy.common.atomic_folder import clear_leftovers, held, replaced_folder
from qeff_proxy.device.pack_dump import new_folder
from qeff_proxy.dump import DumpWriter, read_dump
from qeff_proxy.dump.place import DUMPS
from qeff_proxy.run.run_compiled import new_io_folder

WRITE = """
import os, signal, sys
import numpy as np
from pathlib import Path
from qeff_proxy.dump import DumpWriter

renames = 0
original = Path.rename

def rename(self, target):
    global renames
    renames += 1
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)

with DumpWriter(Path(sys.argv[1]), {}) as writer:
    Path.rename = rename
    writer.step("decode", 0, "body", {"x": np.zeros(5)}, {})
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_run(folder, at_rename):
    """Dump to the folder in a process that is killed while it writes (0), or at a rename."""
    command = [sys.executable, "-c", WRITE, str(folder), str(at_rename)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def write(folder, value=1.0):
    with DumpWriter(folder, {}) as writer:
        writer.step("decode", 0, "body", {"x": np.full(3, value)}, {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_next_dump_clears_what_was_left_while_writing(tmp_path):
    killed_run(tmp_path / "d", 0)
    killed_run(tmp_path / "other", 0)
    write(tmp_path / "d")
    assert [name for name in names(tmp_path) if name.startswith("d")] == ["d"]
    assert [name.startswith("other.incomplete-") for name in names(tmp_path)] == [False, True]


def test_the_older_dump_is_put_back_as_the_next_run_begins(tmp_path):
    write(tmp_path / "d", 7.0)
    killed_run(tmp_path / "d", 2)  # between the two renames
    assert not (tmp_path / "d").exists()
    with pytest.raises(RuntimeError), DumpWriter(tmp_path / "d", {}):
        raise RuntimeError
    assert names(tmp_path) == ["d"]
    assert read_dump(tmp_path / "d").array("decode", 0, "body.in.x")[0] == 7.0


def test_the_older_dump_is_cleared_where_the_new_one_stands(tmp_path):
    write(tmp_path / "d", 7.0)
    shutil.copytree(tmp_path / "d", tmp_path / "d.replaced-abcdefgh")
    write(tmp_path / "d", 8.0)
    assert names(tmp_path) == ["d"]
    assert read_dump(tmp_path / "d").array("decode", 0, "body.in.x")[0] == 8.0


def test_what_a_living_run_writes_or_replaces_is_left_alone(tmp_path):
    write(tmp_path / "d", 7.0)
    (tmp_path / "d").rename(tmp_path / "d.replaced-abcdefgh")
    with held(tmp_path / "d.replaced-abcdefgh"), DumpWriter(tmp_path / "d", {}) as writer:
        before = names(tmp_path)
        command = [sys.executable, "-c", "import sys; from pathlib import Path\n"
                   "from qeff_proxy.common.atomic_folder import clear_leftovers\n"
                   "from qeff_proxy.dump.place import DUMPS\n"
                   "clear_leftovers(DUMPS, Path(sys.argv[1]))", str(tmp_path)]  # fmt: skip
        subprocess.run(command, check=True)
        clear_leftovers(DUMPS, tmp_path)
        assert names(tmp_path) == before
        writer.step("decode", 0, "body", {"x": np.zeros(3)}, {})
    assert read_dump(tmp_path / "d").steps


def test_the_older_dump_is_read_where_a_kill_left_it_beside(tmp_path):
    write(tmp_path / "d", 7.0)
    killed_run(tmp_path / "d", at_rename=2)
    assert not (tmp_path / "d").exists()
    assert read_dump(tmp_path / "d").array("decode", 0, "body.in.x")[0] == 7.0


def test_a_verification_clears_what_earlier_ones_left(tmp_path):
    killed_run(tmp_path / "io" / "verify-1" / "onnxruntime", at_rename=0)
    assert names(tmp_path / "io" / "verify-1") != []
    folder = new_io_folder(SimpleNamespace(folder=tmp_path), "verify-")
    assert folder.name.startswith("verify-20")
    assert names(tmp_path / "io" / "verify-1") == []


def test_a_conversion_clears_what_a_killed_one_left_and_nothing_else(tmp_path):
    for name, file in (("c.incomplete-0123456789ab", "in.pb"), ("c.incomplete-ba9876543210", "x")):
        (tmp_path / name / "test_data_set_0").mkdir(parents=True)
        (tmp_path / name / "test_data_set_0" / file).touch()
    with new_folder(tmp_path / "c") as work:
        (work / "in.pb").touch()
    assert names(tmp_path) == ["c", "c.incomplete-ba9876543210"]


def test_folders_that_hold_something_else_are_not_cleared(tmp_path):
    write(tmp_path / "d")
    for name in ("d.incomplete-abcdefgh", "d.replaced-abcdefgh", "d.incomplete-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = names(tmp_path)
    write(tmp_path / "d")
    assert names(tmp_path) == before


def test_a_folder_is_held_until_it_is_released(tmp_path):
    with replaced_folder(DUMPS, tmp_path / "d") as work:
        clear_leftovers(DUMPS, tmp_path)
        assert work.is_dir()
    (tmp_path / "d").rename(work)
    clear_leftovers(DUMPS, tmp_path)
    assert not work.exists()
