"""``qeff-proxy plugins``, run as users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from qeff_proxy.cli import main

COMMAND = Path(sys.executable).with_name("qeff-proxy")
GOOD = """
    from qeff_proxy.hookspecs import hookimpl

    print("a plugin that prints while it is imported")

    @hookimpl
    def decode():
        return None
"""


@pytest.fixture
def command(site_packages, forked):
    """Run ``qeff-proxy plugins`` beside the packages of the test and no others."""

    def check(arguments, select):
        if select is not None:
            os.environ["QEFF_PROXY_PLUGINS"] = select
        return main(["plugins", *arguments])

    def run(*arguments, select=None):
        if "--check" in arguments:  # imports all libraries
            return forked(check, arguments, select)
        environ = {"PYTHONPATH": str(site_packages.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        if select is not None:
            environ["QEFF_PROXY_PLUGINS"] = select
        return subprocess.run(
            [COMMAND, "plugins", *arguments], env=environ, capture_output=True, text=True
        )

    return run


@pytest.fixture
def faulty(site_packages):
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": "import no_such_module"})
    site_packages.install("brand", {"ssm": "brand_ssm", "cnn": "brand_ssm"}, {"brand_ssm": GOOD})


def by_plugin(done):
    return {report["plugin"]: report for report in json.loads(done.stdout)["plugins"]}


def test_without_check_nothing_is_imported_and_nothing_fails(faulty, command):
    done = command("--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["checked"] is False
    assert by_plugin(done)["acme_rnn"] == {
        "distribution": "acme",
        "version": "1.0",
        "plugin": "acme_rnn",
        "model_types": ["rnn"],
        "hooks": None,
        "state": "listed",
        "reason": "",
    }


def test_check_imports_reports_and_fails(faulty, command):
    done = command("--check", "--json")
    assert done.returncode == 10
    reports = by_plugin(done)
    assert reports["acme_rnn"]["state"] == "failed"
    assert reports["acme_rnn"]["reason"] == (
        "ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert reports["brand_ssm"]["state"] == "ok"
    assert reports["brand_ssm"]["hooks"] == ["decode"]
    assert reports["brand_ssm"]["model_types"] == ["cnn", "ssm"]
    assert "a plugin that prints" in done.stderr


def test_check_passes_where_all_is_well(faulty, command):
    done = command("--check", "--json", select="-acme")
    assert done.returncode == 0, done.stderr
    assert by_plugin(done)["acme_rnn"]["state"] == "disabled"
    generic = json.loads(done.stdout)["generic"]
    assert (generic["distribution"], generic["plugin"]) == ("qeff-proxy", "generic")
    assert (generic["state"], len(generic["hooks"])) == ("ok", 5)


def test_check_fails_on_rivals(site_packages, command):
    site_packages.install("acme", {"rnn": "acme_rnn"}, {"acme_rnn": GOOD})
    site_packages.install("brand", {"rnn": "brand_rnn"}, {"brand_rnn": GOOD})
    assert command().returncode == 0
    done = command("--check")
    assert done.returncode == 10
    assert "QEFF_PROXY_PLUGINS=rnn=acme or QEFF_PROXY_PLUGINS=rnn=brand" in done.stdout


def test_the_table_shows_packages_states_and_reasons(faulty, command):
    done = command("--check")
    rows = [re.split(" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert rows[rows.index(["acme 1.0"]) + 1] == ["acme_rnn", "failed", "rnn"]
    assert rows[rows.index(["brand 1.0"]) + 1] == ["brand_ssm", "ok", "cnn, ssm"]
    assert ["generic", "ok", "every other"] in rows
    assert (
        "acme acme_rnn: ModuleNotFoundError: No module named 'no_such_module'"
        in done.stdout.splitlines()
    )


def test_the_table_shows_packages_that_cannot_be_read(site_packages, command):
    site_packages.install_metadata("damaged", b"[qeff_proxy.families]\nno equals sign\n")
    done = command()
    assert done.returncode == 0
    assert "damaged: its entry points cannot be read" in done.stdout


def test_a_wrong_selection_is_one_line_and_a_usage_error(faulty, command):
    done = command(select="acmee")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "QEFF_PROXY_PLUGINS names 'acmee', which is not installed" in line


def test_the_table_shows_the_hooks_of_what_was_imported(faulty, command):
    lines = command("--check").stdout.splitlines()
    (at,) = [index for index, line in enumerate(lines) if "brand_ssm" in line]
    assert lines[at + 1].strip() == "hooks: decode"
    assert "hooks: " not in command().stdout
