"""The six wheels, in an environment that has nothing else of the project.

Installing torch again would take minutes, so the environment borrows everything but the project
from the one the tests run in: a folder of links to its packages, those of the project left out.
No file of the source tree is on the path, which the first tests make sure of.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("text", "embedding", "audio", "vision", "npu")
PROJECTS = {"qeff-proxy": ROOT} | {f"qeff-proxy-{kind}": ROOT / "plugins" / kind for kind in KINDS}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
PACKAGES = {name: name.replace("-", "_") for name in PROJECTS}


def build_wheel(project: Path, target: Path) -> Path:
    before = set(target.glob("*.whl"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, project])
    (wheel,) = set(target.glob("*.whl")) - before
    return wheel


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Distribution name to its wheel."""
    target = tmp_path_factory.mktemp("wheels")
    return {name: build_wheel(project, target) for name, project in PROJECTS.items()}


@dataclass
class Environment:
    """A virtual environment, and how to run programs in it."""

    folder: Path

    def run(self, program, *arguments, **environ):
        """What ``program`` of this environment prints, run away from the source tree."""
        inherited = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        return run(
            [self.folder / "bin" / program, *arguments],
            env=inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | environ,
            cwd=self.folder,
        )


def borrow_packages(folder: Path) -> None:
    """Fill ``folder`` with links to the installed packages that are not the project's."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            ours = entry.name.startswith(("qeff_proxy", "_editable_impl_qeff"))
            if not ours and entry.suffix != ".pth" and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """An environment that holds the wheels and what they need."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    borrow_packages(folder / "borrowed")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "borrowed.pth").write_text(f"{folder / 'borrowed'}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile"]
    run([*pip, "install", *options, *wheels.values()])
    return Environment(folder)


# The wheels


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_every_file_of_its_package_and_its_licence(wheels, name):
    package = PACKAGES[name]
    source = ROOT / "core" if name == "qeff-proxy" else PROJECTS[name]
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    held = set(zipfile.ZipFile(wheels[name]).namelist())
    metadata = {path for path in held if path.startswith(f"{package}-{VERSION}.dist-info/")}
    assert held - metadata == wanted
    assert f"{package}/py.typed" in wanted
    assert f"{package}-{VERSION}.dist-info/licenses/LICENSE" in metadata


def test_each_extra_of_the_core_brings_its_plugin_package(wheels):
    wheel = zipfile.ZipFile(wheels["qeff-proxy"])
    metadata = message_from_bytes(wheel.read(f"qeff_proxy-{VERSION}.dist-info/METADATA"))
    needs = metadata.get_all("Requires-Dist")
    for kind in KINDS:
        for extra in (kind, "all"):
            assert f"qeff-proxy-{kind}=={VERSION}; extra == '{extra}'" in needs


def test_the_six_packages_have_one_version():
    projects = {
        name: tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        for name, folder in PROJECTS.items()
    }
    assert {project["version"] for project in projects.values()} == {VERSION}
    for name, project in projects.items():
        if name != "qeff-proxy":
            assert f"qeff-proxy=={VERSION}" in project["dependencies"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {re.escape(VERSION)}\b", changelog, flags=re.MULTILINE)


# The environment


def test_the_project_comes_from_the_wheels_alone(environment):
    code = (
        "import importlib, importlib_metadata, json, sys; names = sys.argv[1:];"
        "files = [importlib.import_module(name).__file__ for name in names];"
        "places = [str(d.locate_file('')) for d in importlib_metadata.distributions()"
        " if d.name.startswith('qeff-proxy')];"
        "print(json.dumps({'files': files, 'places': places, 'path': sys.path}))"
    )
    seen = json.loads(environment.run("python", "-c", code, *PACKAGES.values()))
    assert len(seen["files"]) == len(seen["places"]) == len(PROJECTS)
    for path in (*seen["files"], *seen["places"]):
        assert Path(path).is_relative_to(environment.folder / "lib"), path
    assert [path for path in seen["path"] if Path(path).is_relative_to(ROOT / "core")] == []


def test_what_the_wheels_require_is_satisfied(environment):
    pip = [sys.executable, "-m", "pip", "--python", environment.folder / "bin" / "python"]
    command = [*pip, "--disable-pip-version-check", "check"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert said.strip()
    assert not [line for line in said.splitlines() if line.startswith("qeff-proxy")]


def test_the_families_are_listed(environment):
    project = tomllib.loads((PROJECTS["qeff-proxy-text"] / "pyproject.toml").read_text("utf-8"))
    families = project["project"]["entry-points"]["qeff_proxy.families"]
    listing = json.loads(environment.run("qeff-proxy", "plugins", "--json"))
    found = {
        model_type: report["plugin"]
        for report in listing["plugins"]
        for model_type in report["model_types"]
        if report["distribution"] == "qeff-proxy-text"
    }
    assert found == families


def test_every_plugin_can_be_used(environment):
    listing = json.loads(environment.run("qeff-proxy", "plugins", "--check", "--json"))
    states = {report["state"] for report in (*listing["plugins"], listing["generic"])}
    assert states == {"ok"}


def test_gpt2_runs_from_end_to_end(environment, tmp_path):
    said = environment.run("qeff-proxy", "demo", "text", "--json", QEFF_HOME=str(tmp_path))
    report = json.loads(said)["demos"]["text"]
    export = Path(report["export"])
    assert export.parent == tmp_path
    assert report["cut"]["sites"]["embedding"]["module"] == "transformer.wte"
    plugin = json.loads((export / "export.json").read_text("utf-8"))["made_by"]["plugin"]
    assert re.fullmatch("[0-9a-f]{16}", plugin.pop("code"))
    assert plugin == {
        "name": "qeff_proxy_text.causal_lm",
        "distribution": "qeff-proxy-text",
        "version": VERSION,
    }
    assert report["parity"]["passed"]
    assert report["parity"]["equal_tokens"] == report["parity"]["steps"] == 64
    assert (Path(report["io_folder"]) / "manifest.json").is_file()
    assert len(report["text"].split()) > 20


# A package of somebody else's, with an architecture that nothing here knows

MAKE_CHECKPOINT = """
import sys
from acme_models.model import AcmeConfig, AcmeForCausalLM
from qeff_proxy.testing import random_weights
random_weights(AcmeForCausalLM(AcmeConfig())).save_pretrained(sys.argv[1])
"""


def test_a_package_of_ones_own_is_installed_used_and_uninstalled(environment, tmp_path):
    wheel = build_wheel(ROOT / "examples" / "acme-models", tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", environment.folder / "bin" / "python"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    run([*pip, "install", *quiet, "--no-index", "--no-deps", "--no-compile", wheel])

    listing = json.loads(environment.run("qeff-proxy", "plugins", "--check", "--json"))
    acme = {one["plugin"]: one for one in listing["plugins"] if "acme" in one["distribution"]}
    assert acme["acme_models.scaled"]["state"] == "ok"
    report = acme["acme_models.acme"]
    assert report == {
        "distribution": "acme-models",
        "version": "1.0",
        "plugin": "acme_models.acme",
        "model_types": ["acme"],
        "hooks": ["locate_embedding", "locate_lm_head"],
        "state": "ok",
        "reason": "",
    }

    checkpoint = tmp_path / "tiny-acme"
    environment.run("python", "-c", MAKE_CHECKPOINT, checkpoint)
    backends = ["--backend", "onnxruntime", "--backend", "torch"]
    said = environment.run(
        "qeff-proxy", "verify", checkpoint, *backends, "--ids", "5,17,3", "--json",
        QEFF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    verification = json.loads(said)
    assert [one["passed"] for one in verification["backends"]] == [True, True]
    export = json.loads((Path(verification["export"]) / "export.json").read_text("utf-8"))
    assert export["made_by"]["plugin"]["distribution"] == "acme-models"
    assert export["cut"]["sites"]["embedding"]["module"] == "stack.words"

    run([*pip, "uninstall", *quiet, "--yes", "acme-models"])
    listing = json.loads(environment.run("qeff-proxy", "plugins", "--json"))
    assert "acme-models" not in {one["distribution"] for one in listing["plugins"]}
    done = subprocess.run(
        [environment.folder / "bin" / "qeff-proxy", "inspect", checkpoint],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "has model type 'acme', which transformers does not know" in line
    assert "A plugin package can bring an architecture" in line
