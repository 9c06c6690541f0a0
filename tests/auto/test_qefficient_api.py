"""Every public name and argument of QEfficient is known, and docs/qefficient.md says what is true.

``qefficient_api.json`` has them: class → method → parameters, read in its 1.23. A row of the page
that is wrong is printed as it should be.
"""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import qeff_proxy
from qeff_proxy.auto import qefficient
from qeff_proxy.auto.qefficient import ELSEWHERE, Keyword, without_ignored
from qeff_proxy.errors import UsageError

pytestmark = pytest.mark.one_home

PAGE = (Path(__file__).parents[2] / "docs" / "qefficient.md").read_text(encoding="utf-8")
API: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("qefficient_api.json").read_text(encoding="utf-8")
)
TABLES = {
    "from_pretrained": qefficient.LOAD,
    "export": qefficient.EXPORT,
    "compile": qefficient.COMPILE,
    "generate": qefficient.GENERATE,
    "__call__": qefficient.EXEC,
}
HEADINGS = {"from_pretrained": "`from_pretrained`, and the", "__call__": "`cloud_ai_100_exec_kv`"}
#: Obeyed, though no parameter of its own has the name: each has a test in test_qefficient.py.
THROUGH_OPTIONS = {
    "revision",
    "cache_dir",
    "token",
    "torch_dtype",
    "gguf_file",
    "pooling",
    "kv_offload",
    "lang_onnx_path",
    "vision_onnx_path",
    "stream",
    "streamer",
    "iteration",
    "runtime_ai100",
}
VERBS = {"obeyed": "", "ignored": "ignored: ", "refused": "refused: "}


def method_of(name: str, method: str) -> Any:
    found = getattr(qeff_proxy, name)
    return found if method == "__call__" else getattr(found, method)


def classes_with(method: str, argument: str) -> str:
    """The classes whose method has an argument, in short, for the second column."""
    methods = (method, "__init__") if method == "from_pretrained" else (method,)
    having = [
        name.removeprefix("QEFFAutoModel").removeprefix("For") or "(plain)"
        for name, known in API.items()
        if any(argument in known.get(one, ()) for one in methods)
    ]
    everywhere = sum(method in known for known in API.values())
    return "all" if len(having) == everywhere else ", ".join(having) or "passed on"


def row(method: str, argument: str, word: Keyword) -> str:
    return f"| `{argument}` | {classes_with(method, argument)} | {VERBS[word.action]}{word.here} |"


@pytest.mark.parametrize("method", TABLES)
def test_the_page_has_the_table_of_a_method(method: str) -> None:
    heading = HEADINGS.get(method, f"`{method}`")
    section = PAGE.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [row(method, argument, word) for argument, word in TABLES[method].items()]


def test_the_page_has_the_public_names() -> None:
    ours = [f"| `{name}` | the same |" for name in API]
    others = [f"| `{name}` | not here: {why} |" for name, why in ELSEWHERE.items()]
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert rows[: len(ours) + len(others)] == ours + others


@pytest.mark.parametrize("name", API)
def test_every_argument_of_qefficient_is_known(name: str) -> None:
    for method, arguments in API[name].items():
        parameters = inspect.signature(method_of(name, method)).parameters
        table = TABLES["from_pretrained" if method == "__init__" else method]
        for argument in arguments:
            if table[argument].action == "obeyed":
                assert argument in parameters or argument in THROUGH_OPTIONS, (method, argument)
            else:
                assert argument not in parameters, (method, argument)


@pytest.mark.parametrize("method", TABLES)
def test_an_argument_that_is_not_obeyed_says_why(method: str) -> None:
    name = "cloud_ai_100_exec_kv" if method == "__call__" else "QEFFAutoModelForCausalLM"
    called = method_of(name, method)
    for argument, word in TABLES[method].items():
        for quiet in (None, *word.quiet):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                without_ignored({argument: quiet}, TABLES[method], called)
        asks = {argument: "something"}
        if word.action == "obeyed":
            assert without_ignored(asks, TABLES[method], called) == asks
        elif word.action == "refused":
            with pytest.raises(UsageError, match=argument):
                without_ignored(asks, TABLES[method], called)
        else:
            with pytest.warns(UserWarning, match=f"^{argument} is ignored: ") as caught:
                assert without_ignored(asks, TABLES[method], called) == {}
            assert str(caught[0].message).endswith(word.here)
            assert caught[0].filename == __file__


@pytest.mark.parametrize("name", sorted(set(ELSEWHERE) - {"export"}))
def test_a_class_that_is_not_here_says_what_to_do(name: str) -> None:
    with pytest.raises(ImportError, match=f"no qeff_proxy.{name}: "):
        getattr(qeff_proxy, name)
