"""The documentation builds without warnings, and its pages load nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from qeff_proxy import errors
from qeff_proxy.cli import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", folder]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


class Sources(HTMLParser):
    """The URLs that a browser loads for a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        fetched = {"script": "src", "img": "src", "iframe": "src", "source": "src"}.get(tag)
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "alternate"):
            fetched = "href"
        if fetched and values.get(fetched):
            self.found.append(values[fetched])


def test_nothing_is_fetched_from_other_hosts(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        sources = Sources()
        sources.feed(page.read_text(encoding="utf-8"))
        assert sources.found
        outside = [url for url in sources.found if re.match(r"(https?:)?//", url)]
        assert outside == [], page.name


def test_every_command_and_exit_code_is_in_the_reference(site):
    text = (site / "commands.html").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"usage: qeff-proxy {name}" in text
    assert "usage: qeff-proxy plugin new" in text
    for name in errors.__all__:
        if name != "ProxyError":
            assert name in text


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("hooks", ("hookspecs.build_proxy", "sites.Site", "parts.Part", "flows.Flow")),
        ("hooks", ("testing.families.FamilySuite", "testing.family.Capabilities")),
        ("hooks", ("layers.replace_modules.replace_modules", "testing.tiny.tiny_config")),
        ("python", ("load.load_model.load_model", "load.load_model.with_options")),
        ("python", ("cut.cut_model.cut_model", "export.export_model.export_model")),
        ("python", ("backends.compile_export.compile_export", "run.run_compiled.run_compiled")),
        ("python", ("compare.compare_dumps.compare_dumps", "verify.verify_model.verify_model")),
    ],
)
def test_functions_and_classes_are_in_the_reference(site, page, names):
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    for name in names:
        assert f'id="qeff_proxy.{name}"' in text


def test_messages_that_troubleshooting_names_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    folders = (ROOT / "core", *(ROOT / "plugins").glob("*/qeff_proxy_*"))
    sources = [path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py")]
    # Join adjacent string literals, as Python does.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    for title in re.findall(r"^### (.*)$", page, flags=re.MULTILINE):
        for alternative in title.split(", or: "):
            for piece in re.split(r" … ?", alternative):
                assert piece.strip() in code, title


def test_every_page_stands_once_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
