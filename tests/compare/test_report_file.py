"""A report gets to its place whole, and over nothing of a dump or an export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qeff_proxy.cli import main
from qeff_proxy.compare import compare_dumps, write_report

pytestmark = pytest.mark.one_home


def test_a_report_that_cannot_be_written_leaves_the_older_one(good, tmp_path):
    code = (
        "import resource, sys; from qeff_proxy.compare import compare_dumps, write_report\n"
        "from qeff_proxy.errors import DumpError\n"
        "comparison = compare_dumps(sys.argv[1], sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: write_report(comparison, sys.argv[2])\n"
        "except DumpError as error: print(error)\n"
    )
    report = tmp_path / "report.html"
    report.write_text("older")
    done = subprocess.run(
        [sys.executable, "-c", code, str(good), str(report)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written: File too large" in done.stdout
    assert report.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["manifest.json", "decode/body.in.inputs_embeds.npy", "new"])
def test_a_report_replaces_no_file_of_a_dump(good, tmp_path, name, capsys):
    dump = shutil.copytree(good, tmp_path / "dump")
    before = sorted((path, path.read_bytes()) for path in dump.rglob("*") if path.is_file())
    assert main(["compare", str(good), str(dump), "--html", str(dump / name)]) == 9
    assert "is a dump or an export" in capsys.readouterr().err
    after = sorted((path, path.read_bytes()) for path in dump.rglob("*") if path.is_file())
    assert after == before
    assert main(["compare", str(good), str(dump), "--html", str(dump / "report.html")]) == 0


def test_a_report_goes_where_a_link_leads_and_to_what_is_no_file(good, tmp_path):
    comparison = compare_dumps(good, good)
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    write_report(comparison, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text().startswith("<!doctype html>")
    write_report(comparison, "/dev/null")
    assert not Path("/dev/null").is_file()
