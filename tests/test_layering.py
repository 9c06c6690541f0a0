"""Who may know whom.

A plugin imports public names of the core and nothing of another plugin; the core imports no
plugin and branches on no family. Inside the core, packages stand in one order and import
only what stands before them, and no modules import each other in a circle. The rules are functions
of source text, so that each is also shown a text that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "core").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*/qeff_proxy_*/**/*.py"))
#: The packages and modules at the top of the core. Each imports only what stands before it.
ORDER = [
    "errors",
    "common",
    "arrays",
    "parts",
    "sites",
    "request",
    "hookspecs",
    "tensor_names",
    "compile_options",
    "graph",
    "session",
    "dump",
    "artifact",
    "plugins",
    "layers",
    "load",
    "families",
    "flows",
    "cut",
    "compare",
    "backends",
    "device",
    "export",
    "run",
    "verify",
    "isolate",
    "score",
    "precision",
    "sweep",
    "demo",
    "auto",
    "base",
    "customop",
    "transformers",
    "generation",
    "utils",
    "testing",
    "cli",
    "cloud",
]
#: The package's own `__init__` hands names on, when they are first used, and `__main__` starts it.
OUTSIDE = {"", "__main__"}
# Families whose plugins are planned; the rest is read from the entry points.
PLANNED = ("bert", "gemma3", "internvl", "llava", "molmo", "wav2vec2", "whisper")
# The checkpoint that comes with the program is named after what it is; /opt is a folder; llama.cpp
# is a program.
ALLOWED = re.compile(r"tiny[-_ ]gpt2|/opt/|llama\.cpp|llama-gguf-split", re.IGNORECASE)
# A suite for backends needs some real model to compile; it branches on none.
EXAMPLES = {"core/qeff_proxy/testing/backend_parts.py"}


def registered_families() -> set[str]:
    families = set(PLANNED)
    for file in (ROOT / "plugins").glob("*/pyproject.toml"):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        claims = project.get("entry-points", {}).get("qeff_proxy.families", {})
        families |= {claim.partition("/")[0] for claim in claims}
    return families


def public_names(module: str) -> set[str] | None:
    """What a module of the core defines and a package re-exports, or None where there is none."""
    path = ROOT / "core" / Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            body = ast.parse(file.read_text(encoding="utf-8")).body
            names = {name for node in body for name in names_bound(node, file.name)}
            return {name for name in names if not name.startswith("_")}
    return None


def names_bound(node: ast.stmt, file: str) -> list[str]:
    """The names that a statement of a module defines; its imports count only in a package."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.If):  # what type checkers see, and what runs
        return [name for each in node.body + node.orelse for name in names_bound(each, file)]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [
            each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
        ]
    if isinstance(node, ast.ImportFrom) and file == "__init__.py":
        return [alias.asname or alias.name for alias in node.names]
    return []


def submodules(module: str) -> set[str]:
    """Public modules directly below a package of the core."""
    folder = ROOT / "core" / Path(*module.split("."))
    return {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}


def imports_of(source: str) -> list[tuple[str, str | None]]:
    """Every import as (module, name), wherever it stands; the name is None for ``import x``."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(module, alias.name) for alias in node.names]
    return found


def plugin_faults(source: str, package: str) -> list[str]:
    """What a module of the plugin package ``package`` imports that it may not."""
    faults = []
    for module, name in imports_of(source):
        top = module.split(".")[0]
        if top.startswith("qeff_proxy_") and top != package:
            faults.append(f"imports {module}, another plugin")
        elif top == "qeff_proxy":
            exported = public_names(module)
            if any(part.startswith("_") for part in module.split(".")) or exported is None:
                faults.append(f"imports {module}, which is no public module of the core")
            elif name is not None and name not in exported | submodules(module):
                faults.append(f"imports {module}.{name}, which it does not define")
    return faults


def core_import_faults(source: str) -> list[str]:
    """Which plugin packages a module of the core imports."""
    return [
        f"imports {module}" for module, _ in imports_of(source) if module.startswith("qeff_proxy_")
    ]


def module_of(path: Path) -> str:
    """The dotted name of a module below ``qeff_proxy``; empty for the package's own `__init__`."""
    parts = path.relative_to(ROOT / "core" / "qeff_proxy").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_between(sources: dict[str, str]) -> set[tuple[str, str]]:
    """Pairs of modules of the core, the first of which imports the second, wherever it does so."""
    pairs = set()
    for module, source in sources.items():
        for target, name in imports_of(source):
            if target.split(".")[0] != "qeff_proxy":
                continue
            base = target.removeprefix("qeff_proxy").lstrip(".")
            inner = f"{base}.{name}".lstrip(".")
            pairs.add((module, inner if inner in sources else base))
    return {(one, other) for one, other in pairs if one != other}


def order_faults(sources: dict[str, str]) -> list[str]:
    """Imports of what stands later in `ORDER`, and what has no place in it."""
    tops = {module.split(".")[0] for module in sources} - OUTSIDE
    faults = [f"{top} has no place in ORDER" for top in sorted(tops - set(ORDER))]
    for one, other in sorted(imports_between(sources)):
        first, second = one.split(".")[0], other.split(".")[0]
        if first in ORDER and second in ORDER and ORDER.index(first) < ORDER.index(second):
            faults.append(f"{one} imports {other}, which stands after it")
    return faults


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, `TYPE_CHECKING` imports and late ones included.

    A package's `__init__` hands names on, so that importing from it is no circle of its own.
    """
    follows: dict[str, set[str]] = {}
    for one, other in imports_between(sources):
        follows.setdefault(one, set()).add(other)
    try:
        graphlib.TopologicalSorter(follows).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def words_of(source: str) -> list[tuple[int, str]]:
    """Identifiers and string constants with their lines; docstrings and comments are prose."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                words.append((line, value))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.append((line, node.value))
    return words


def family_faults(source: str, families: set[str]) -> list[str]:
    """Where a module names a model family: ``gpt2``, ``GPT2Model``, ``"model.gpt_neox.layers"``."""
    wanted = {family.replace("_", "") for family in families}
    faults = []
    for line, word in words_of(source):
        text = ALLOWED.sub("", word)
        for chunk in re.findall(r"[A-Za-z0-9_]+", text):
            pieces = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", chunk)
            joined = {
                "".join(pieces[start:stop]).lower()
                for start in range(len(pieces))
                for stop in range(start + 1, len(pieces) + 1)
            }
            faults += [f"line {line} names {name}: {word!r}" for name in sorted(joined & wanted)]
    return faults


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "plugins").parts[1]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_look_at():
    assert len(CORE) > 10
    assert {package_of(path) for path in PLUGINS} >= {
        "qeff_proxy_audio",
        "qeff_proxy_embedding",
        "qeff_proxy_npu",
        "qeff_proxy_text",
        "qeff_proxy_vision",
    }
    assert {"gpt2", "llama", "codegen"} <= registered_families()


def sources_of_core() -> dict[str, str]:
    return {module_of(path): path.read_text(encoding="utf-8") for path in CORE}


def test_packages_import_only_what_stands_before_them():
    assert order_faults(sources_of_core()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(sources_of_core()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from qeff_proxy.verify.options import VerifyOptions",
        "import qeff_proxy.export.export_model",
        "if TYPE_CHECKING:\n    from qeff_proxy.cut import Cut",
        "def f():\n    from qeff_proxy import cli",
    ],
)
def test_an_import_turned_round_is_seen(line):
    sources = sources_of_core()
    sources["dump.reader"] += f"\n{line}\n"
    assert len(order_faults(sources)) == 1


def test_a_circle_inside_a_package_is_seen():
    sources = sources_of_core()
    sources["verify.options"] += "\ndef f():\n    from qeff_proxy.verify.runs import Runs\n"
    assert order_faults(sources) == []
    assert len(circles(sources)) == 1


def test_a_package_without_a_place_is_seen():
    assert order_faults({**sources_of_core(), "extras.one": ""}) == ["extras has no place in ORDER"]


@pytest.mark.parametrize("path", PLUGINS, ids=relative)
def test_a_plugin_imports_no_other_plugin_and_nothing_private(path):
    assert plugin_faults(path.read_text(encoding="utf-8"), package_of(path)) == []


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_imports_no_plugin_and_names_no_family(path):
    source = path.read_text(encoding="utf-8")
    assert core_import_faults(source) == []
    if relative(path) not in EXAMPLES:
        assert family_faults(source, registered_families()) == []


def test_the_core_names_no_backend_of_a_package():
    """A vendor's compiler is its package's affair; QEfficient's options and the extras aside."""
    npu = tomllib.loads((ROOT / "plugins" / "npu" / "pyproject.toml").read_text(encoding="utf-8"))
    names = "|".join(npu["project"]["entry-points"]["qeff_proxy.backends"])
    found = {relative(p) for p in CORE if re.search(rf"(?i)\b({names})", p.read_text("utf-8"))}
    assert found == {
        "core/qeff_proxy/auto/qefficient.py",
        "core/qeff_proxy/backends/registry.py",
    }


@pytest.mark.parametrize(
    "source",
    [
        "import qeff_proxy_audio",
        "def f():\n    from qeff_proxy_audio.whisper import decode",
        "from qeff_proxy.hookspecs import _private",
        "from qeff_proxy.hookspecs import pluggy",
        "from qeff_proxy._private import anything",
        "import qeff_proxy.no_such_module",
    ],
)
def test_a_plugin_that_reaches_too_far_is_seen(source):
    assert len(plugin_faults(source, "qeff_proxy_text")) == 1


def test_what_a_plugin_may_import_is_no_fault():
    source = (
        "import torch\nimport qeff_proxy.sites\nfrom qeff_proxy import errors\n"
        "from qeff_proxy.hookspecs import hookimpl\nfrom qeff_proxy_text.causal_lm import decode"
    )
    assert plugin_faults(source, "qeff_proxy_text") == []


@pytest.mark.parametrize(
    "source",
    [
        "if config.model_type == 'gpt2': pass",
        "GPT2LMHeadModel",
        "from transformers import LlamaConfig",
        "from transformers.models.gpt_neox import modeling_gpt_neox",
        "def cut_opt_model(): ...",
        "x = f'model.{y}.gpt_neox.layers'",
        "path = 'transformers.models.qwen3_moe.modeling_qwen3_moe'",
        "is_whisper = True",
    ],
)
def test_a_core_that_names_a_family_is_seen(source):
    assert family_faults(source, registered_families())


def test_a_core_that_imports_a_plugin_is_seen():
    assert core_import_faults("def f():\n    import qeff_proxy_text.gpt2")


def test_prose_and_like_sounding_words_are_no_fault():
    source = (
        '"""Gemma scales its embedding; GPT2 does not."""\n'
        "# llama\noptions = adopt = coherent = 'philosophy'\nfolder = 'tiny-gpt2'"
    )
    assert family_faults(source, registered_families()) == []
