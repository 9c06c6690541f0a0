"""CONTRIBUTING.md lists the packages in their order and names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "qeff_proxy"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL))


def test_the_map_lists_every_package_in_the_order_of_imports():
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    (order,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    ]
    table = PAGE.partition("| package | what is in it |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(order)
    assert listed == order


def test_files_and_folders_exist():
    # New files that a reader is to write: `acme`, `<command>`.
    paths = [name for name in CODE if re.fullmatch(r"[\w./-]+(\.(py|md|toml|txt)|/)", name)]
    paths = [path for path in paths if "acme" not in path]
    assert len(paths) > 30
    folders = (CORE, ROOT, ROOT / "tests" / "compare", ROOT / "plugins" / "text")
    assert [p for p in paths if not any((folder / p).exists() for folder in folders)] == []


def test_names_of_the_code_exist():
    names = {name for name in CODE if re.fullmatch(r"_?[a-z]+(_[a-z]+)+|[A-Z]\w+|_[a-z]+", name)}
    sources = [path.read_text(encoding="utf-8") for path in CORE.rglob("*.py")]
    words = {word for source in sources for word in re.findall(r"\w+", source)}
    assert len(names) > 30
    assert sorted(names - words) == []
