"""An edited backend compiles anew, and so does one whose base class was edited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import qeff_proxy_npu

PROGRAM = """
import sys
from pathlib import Path
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.testing.backend_parts import make_export
from qeff_proxy.artifact.export_folder import read_export
folder = Path(sys.argv[1])
export = read_export(folder) if folder.exists() else make_export(folder)
print(compile_export(export, "openvino").folder.name)
"""


@pytest.mark.parametrize("edited", ["openvino/session.py", "fixed_shapes/plan.py"])
def test_edited_code_compiles_anew(edited: str, tmp_path: Path) -> None:
    copy = tmp_path / "site" / "qeff_proxy_npu"
    shutil.copytree(Path(qeff_proxy_npu.__file__).parent, copy)
    search = [str(copy.parent), *filter(None, [os.environ.get("PYTHONPATH")])]

    def compiled() -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / "export"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    before = compiled()
    assert compiled() == before
    path = copy / edited
    path.write_text(path.read_text("utf-8") + "\n# edited\n", "utf-8")
    assert compiled() != before
