"""An export that is there is found by its checkpoint's files and what is installed, at once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import qeff_proxy
from qeff_proxy.cli import main
from qeff_proxy.errors import CheckpointError
from qeff_proxy.export.cache_key import export_key, find_known_export
from qeff_proxy.export.export_model import export_model
from qeff_proxy.load.load_model import load_model, with_options
from qeff_proxy.plugins.manager import Plugins

PLUGINS = Plugins.discover()


@pytest.fixture
def copy(saved_gpt2: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_gpt2, tmp_path / "copy")


@pytest.mark.parametrize(
    ("kind", "dtype", "options", "opset", "weights"),
    [
        ("stub", "float16", {"pooling": "mean", "normalize": None}, 21, "copy"),
        ("split", "float32", {}, None, "reference"),
    ],
)
def test_it_is_the_one_that_export_would_give(
    kind: Any, dtype: str, options: Any, opset: int, weights: str, copy: Path, home: Path
) -> None:
    def find() -> Any:
        return find_known_export(
            str(copy), kind, dtype=dtype, options=options, opset=opset, weights=weights
        )

    assert find() is None
    loaded = with_options(load_model(str(copy), dtype=dtype), options)
    made = export_model(loaded, PLUGINS.hooks_for("gpt2"), kind, opset=opset, weights=weights)
    assert find() == made
    others: dict[str, Any] = {"dtype": "bfloat16"}, {"options": {"pooling": "cls"}}, {"opset": 23}
    for other in others:
        asked = {"dtype": dtype, "options": options, "opset": opset, "weights": weights, **other}
        assert find_known_export(str(copy), kind, **asked) is None
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + " ")
    assert find() is None
    values = json.loads(config)
    # What it is then loaded as, only transformers can say.
    for change in ({"auto_map": {"AutoModel": "x.Y"}}, {"architectures": None}):
        (copy / "config.json").write_text(json.dumps({**values, **change}))
        assert find() is None
    (copy / "config.json").write_text(config)
    assert find() == made
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        find()


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "whisper", "llava", "of no plugin"])
def test_a_plugin_is_named_without_being_imported(model_type: str) -> None:
    origin, hooks = PLUGINS.origin(model_type), PLUGINS.hooks_for(model_type)
    assert (origin.plugin, origin.distribution, origin.version) == (
        hooks.plugin,
        hooks.distribution,
        hooks.version,
    )


def test_the_command_line_imports_nothing_heavy_for_it(saved_gpt2: Path, capsys: Any) -> None:
    program = (
        "import sys, qeff_proxy.cli as cli; code = cli.main(sys.argv[1:]); "
        "print(*{'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules)); sys.exit(code)"
    )

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    compiling = ("compile", str(saved_gpt2), "--ctx-len", "16")
    assert main(compiling) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    said, again, imported = run(*compiling)
    assert "was compiled already" in said
    assert again == folder
    assert imported == ""
    *_, export, imported = run("export", str(saved_gpt2))
    assert folder.startswith(export)
    assert imported == ""


def test_an_edit_anywhere_in_the_core_is_another_key(copy: Path) -> None:
    """The hash is of the whole package, not of the folder that the hashing module stands in."""
    loaded = load_model(str(copy))
    key = export_key(loaded, PLUGINS.hooks_for("gpt2"), "split", None)
    digest = hashlib.sha256()
    root = Path(qeff_proxy.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert {root / "errors.py", root / "export" / "cache_key.py"} < set(files)
    for file in files:
        digest.update(file.read_bytes())
    assert key["code"] == digest.hexdigest()[:16]
