"""Run a quick subset of the tests with the oldest and the newest torch and transformers.

``make test-versions`` makes an environment per release of torch below ``build/versions``, exchanges
transformers in it, runs `SUBSET` with each pair of `VERSIONS` and prints a table. ``--write`` puts
the table into ``docs/versions.md``. Needs nothing but Python; downloads several gigabytes.

Exit codes: 0, every pair passed; 1, a test failed or a release could not be installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- versions: table -->", "<!-- versions: end -->"
PLUGINS = ("text", "embedding", "audio", "vision")


@dataclass(frozen=True)
class Versions:
    """A row of the table.

    Attributes:
        torch: A release.
        transformers: A release.
        oldest: Install the oldest release that ``pyproject.toml`` allows of everything else too,
            rather than the one that ``constraints.txt`` pins.
    """

    torch: str
    transformers: str
    oldest: bool = False


VERSIONS = (
    Versions("2.13.0", "5.20.0", oldest=True),
    Versions("2.13.0", "5.24.0"),
    Versions("2.15.0", "5.20.0"),
    Versions("2.15.0", "5.24.0"),
)

#: Load, cut, trace, export (whole and layer by layer), run, generate and verify: GPT-2, Llama,
#: BERT, Whisper and LLaVA.
SUBSET = (
    *(f"plugins/{plugin}/tests/test_conformance.py" for plugin in PLUGINS),
    "tests/families/test_architectures.py",
    "tests/flows/generation/test_greedy.py",
    "tests/testing/test_streamed_families.py",
    "tests/verify/test_verify_model.py",
)
#: pytest's ``-k``: which tests of those files.
CHOSEN = """not Wav2Vec2 and (
    cut_is_verified or graphs_give_what or steps_equal_one_pass or dump_is_complete
    or every_backend_gives or outputs_become or test_greedy or all_passed_is_exit_code
    or uncut_model and (llama-4 or gpt2-2) or equal_pytorch and (bert or whisper or llava)
)"""
#: Older releases of transformers bring it on themselves; all other warnings stay errors.
LIBRARY_WARNING = "ignore:`torch.jit.script` is deprecated"
#: What the subset imports besides the packages and what they need.
TEST_PACKAGES = ("pytest",)


@dataclass(frozen=True)
class Result:
    """What became of one row.

    Attributes:
        versions: The row.
        outcome: ``"38 passed"``, ``"2 failed, 36 passed"`` or ``"not installed: …"``.
        passed: Whether tests ran and none failed.
        installed: Distribution name → the release that was tested.
    """

    versions: Versions
    outcome: str
    passed: bool
    installed: Mapping[str, str] = field(default_factory=dict)


def pins(versions: Versions) -> dict[str, str]:
    """Distribution name → release, for all that is installed for a row."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = releases_in(lines)
    if versions.oldest:
        pinned |= oldest_releases()
    return {**pinned, "torch": versions.torch, "transformers": versions.transformers}


def oldest_releases() -> dict[str, str]:
    """Distribution name → the oldest release that the packages allow."""
    projects = (ROOT, *(ROOT / "plugins" / plugin for plugin in PLUGINS))
    oldest: dict[str, str] = {}
    for project in projects:
        text = (project / "pyproject.toml").read_text("utf-8")
        for requirement in tomllib.loads(text)["project"]["dependencies"]:
            match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
            if match:
                oldest[canonical(match[1])] = match[2]
    return oldest


def canonical(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def releases_in(lines: Iterable[str]) -> dict[str, str]:
    """Distribution name → release, of lines such as ``torch==2.13.0``."""
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonical(name): release for name, release in pairs}


def install(versions: Versions) -> tuple[Path, str]:
    """Make or change the environment of a row.

    Returns:
        Its interpreter, and why it could not be made, or an empty string.
    """
    folder = ROOT / "build" / "versions" / f"torch-{versions.torch}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, symlinks=True)
    constraints = folder / "constraints.txt"
    releases = pins(versions)
    constraints.write_text(
        "".join(f"{name}=={release}\n" for name, release in releases.items()), "utf-8"
    )
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--constraint", constraints]
    packages = (ROOT, *(ROOT / "plugins" / plugin for plugin in PLUGINS))
    for command in (
        [*pip, "hatchling", "editables"],
        # Names too, so that pip replaces a release that would satisfy pyproject.toml as well.
        [*pip, "--no-build-isolation", *TEST_PACKAGES, *oldest_releases()]
        + [argument for package in packages for argument in ("--editable", package)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return python, why_not_installed(done.stdout + done.stderr)
    return python, ""


def why_not_installed(message: str) -> str:
    """The reason that pip gives, in one line."""
    errors = [line.removeprefix("ERROR: ") for line in message.splitlines() if "ERROR:" in line]
    for line in errors:
        if "No matching distribution found for" in line:
            return f"the package index has no {line.rsplit(' ', 1)[1]} for this Python and system"
    asked = re.findall(r"The user requested \(constraint\) (\S+)", message)
    if asked:
        return f"pip's constraints disagree: {', '.join(asked)}"
    return errors[0] if errors else (message.strip().splitlines() or ["pip said nothing"])[-1]


def run_subset(python: Path) -> tuple[str, bool]:
    """Run the subset; give pytest's closing words, and whether all passed."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-W", LIBRARY_WARNING, "-k", " ".join(CHOSEN.split())]
    done = subprocess.run(  # noqa: S603
        [*command, *SUBSET], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return closing_words(done.stdout), done.returncode == 0


def closing_words(output: str) -> str:
    """How many passed, failed and so on, from what pytest printed last."""
    last = (output.strip().splitlines() or [""])[-1]
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)\b", last)
    return ", ".join(counts) or "no test ran"


def installed_releases(python: Path) -> dict[str, str]:
    """Distribution name → the release in an environment."""
    command = [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return releases_in(done.stdout.splitlines())


def check_row(versions: Versions) -> Result:
    """Install a row's releases and run the subset with them."""
    python, reason = install(versions)
    if reason:
        return Result(versions, f"not installed: {reason}", passed=False)
    outcome, passed = run_subset(python)
    return Result(versions, outcome, passed, installed_releases(python))


COLUMNS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def table_of(results: Iterable[Result]) -> str:
    """The results as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} | result |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for result in results:
        asked = {"torch": result.versions.torch, "transformers": result.versions.transformers}
        releases = {**asked, **result.installed}
        # Without the build, such as "+cpu", which differs from system to system.
        cells = [releases.get(name, "").partition("+")[0] for name in COLUMNS]
        lines.append(f"| {' | '.join([*cells, result.outcome])} |")
    return "\n".join(lines)


def write_table(page: Path, table: str) -> None:
    """Put ``table`` between the marks of ``page``."""
    text = page.read_text("utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    python = ".".join(map(str, sys.version_info[:2]))
    page.write_text(f"{before}{START}\nPython {python}:\n\n{table}\n{END}{after}", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="only the rows of this release")
    parser.add_argument("--transformers", help="only the rows of this release")
    parser.add_argument("--write", action="store_true", help=f"the table into {PAGE.name} too")
    options = parser.parse_args(arguments)
    rows = [
        row
        for row in VERSIONS
        if options.torch in (None, row.torch) and options.transformers in (None, row.transformers)
    ]
    if not rows:
        parser.error("no row has these releases: see VERSIONS")
    if options.write and len(rows) < len(VERSIONS):
        parser.error("--write takes the whole table: leave --torch and --transformers out")
    results = []
    for row in rows:
        print(f"torch {row.torch}, transformers {row.transformers} …", flush=True)
        results.append(check_row(row))
        print(f"  {results[-1].outcome}", flush=True)
    table = table_of(results)
    print(f"\n{table}")
    if options.write:
        write_table(PAGE, table)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
