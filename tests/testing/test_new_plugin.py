"""``qeff-proxy plugin new`` writes packages that pass their own conformance suites as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from qeff_proxy.cli import main
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.testing.new_plugin import KINDS

#: The package that the plugin page shows: an architecture of its own.
EXAMPLE = Path(__file__).parents[2] / "examples" / "acme-models"
DEFAULTS = json.loads(
    (files("qeff_proxy.testing") / "templates/plugin/kinds.json").read_text("utf-8")
)


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_each_kind_passes_its_suite_at_once(tmp_path, monkeypatch, forked):
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        assert main(["plugin", "new", f"acme-{kind}", "--like", kind]) == 0
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", site]
    run([*pip, *options, *(tmp_path / f"acme-{kind}" for kind in KINDS), EXAMPLE])
    monkeypatch.syspath_prepend(site)

    listing = json.loads(forked(main, ["plugins", "--check", "--json"]).stdout)
    ours = {one["distribution"]: one for one in listing["plugins"]}
    for kind in KINDS:
        report = ours[f"acme-{kind}"]
        assert (report["state"], report["version"]) == ("ok", "0.1.0")
        assert report["model_types"] == [DEFAULTS[kind]["model_type"]]

    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error"]
    tests = [tmp_path / f"acme-{kind}" / "tests" for kind in KINDS] + [EXAMPLE / "tests"]
    done = forked(pytest.main, [*options, "-p", "no:xdist", *map(str, tests)])
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 30 * len(tests)


def test_the_defaults_are_claimed_by_no_installed_package():
    claimed = {entry.name for entry in Plugins.discover({}).entries}
    assert claimed & {kind["model_type"] for kind in DEFAULTS.values()} == set()


def test_the_sites_of_another_model_type_are_filled_in(tmp_path):
    arguments = ["--model-type", "biogpt", "--output", str(tmp_path / "deep" / "new")]
    assert main(["plugin", "new", "acme", *arguments]) == 0
    source = (tmp_path / "deep" / "new" / "acme" / "biogpt.py").read_text(encoding="utf-8")
    assert 'Site("biogpt.embed_tokens")' in source
    assert 'Site("output_projection")' in source
    compile(source, "biogpt.py", "exec")


@pytest.mark.parametrize(
    ("model_type", "note"),
    [
        ("mine", "transformers knows no model type 'mine': register your classes"),
        ("xlnet", "transformers made no tiny xlnet (NotImplementedError: The model xlnet is one"),
    ],
)
def test_what_the_author_must_fill_in_is_said(model_type, note, tmp_path, capsys):
    folder = tmp_path / "new"
    arguments = ["--model-type", model_type, "--output", str(folder)]
    assert main(["plugin", "new", "acme", *arguments]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Before that: {note}")
    assert last.endswith(f"Set the sites in acme/{model_type}.py.")
    assert 'Site("lm_head")' in (folder / "acme" / f"{model_type}.py").read_text("utf-8")


def test_a_recognizer_whose_config_names_no_vocabulary_is_known(tmp_path, capsys):
    arguments = ["--like", "audio", "--model-type", "wav2vec2-conformer"]
    assert main(["plugin", "new", "acme", *arguments, "--output", str(tmp_path / "new")]) == 0
    assert "Before that" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["acme models"], "'acme models' is no name of a package"),
        (["-x"], "NAME"),
        (["7up"], "gives no name that Python can import"),
        (["class"], "gives no name that Python can import"),
        (["json"], "is the name of a package that is there already"),
        (["qeff-proxy"], "is the name of a package that is there already"),
        (["qeff_proxy_text"], "'qeff_proxy_text' is the name of a package that is installed here"),
        (["torch"], "'torch' is the name of a package that is installed here"),
        (["a" * 300], "has 300 characters"),
        (["acme", "--model-type", "llama"], "served by qeff-proxy-text already"),
        (["acme", "--model-type", "no such"], "is no model type"),
        (["acme", "--model-type", "segformer"], "transformers makes no AutoModelForCausalLM"),
        (["acme", "--model-type", "t5"], "transformers makes no AutoModelForCausalLM"),
        (["there"], "there exists already"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    try:
        code = main(["plugin", "new", *arguments])
    except SystemExit as error:  # the parser's own refusals
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["plugin", "new", "acme", "--output", str(tmp_path / "file" / "x")]) == 7
    assert "cannot write" in capsys.readouterr().err
