"""What others may rely on: the names of the public modules, which `__all__` lists, stay."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root in (ROOT / "core", *sorted((ROOT / "plugins").iterdir()))
    for path in sorted(root.glob("qeff_proxy*/**/*.py"))
}

#: Modules of QEfficient whose import says what there is instead.
ABSENT = {"qeff_proxy.base", "qeff_proxy.customop", "qeff_proxy.transformers"}

# What users and plugins are written against. A name leaves only with a new major version.
RELIED_ON = {
    "qeff_proxy": [
        "Absent",
        "ClassificationResult",
        "GenerationResult",
        "MaskSpec",
        "Part",
        "Plugins",
        "Proxy",
        "QEFFAutoModel",
        "QEFFAutoModelForCTC",
        "QEFFAutoModelForCausalLM",
        "QEFFAutoModelForImageTextToText",
        "QEFFAutoModelForMaskedLM",
        "QEFFAutoModelForSeq2SeqLM",
        "QEFFAutoModelForSequenceClassification",
        "QEFFAutoModelForSpeechSeq2Seq",
        "QEFFAutoModelForTokenClassification",
        "QEffAutoPeftModelForCausalLM",
        "Request",
        "Site",
        "TensorSpec",
        "cloud_ai_100_exec_kv",
        "hookimpl",
    ],
    "qeff_proxy.errors": [
        "ArtifactError",
        "BackendError",
        "CheckpointError",
        "CutError",
        "DumpError",
        "ExportError",
        "PluginError",
        "ProxyError",
        "UnsupportedModelError",
        "UsageError",
    ],
    "qeff_proxy.hookspecs": ["HOOK_API_VERSION", "PROJECT_NAME", "hookimpl", "hookspec"],
    "qeff_proxy.parts": ["Kind", "MaskKind", "MaskSpec", "Part", "Proxy", "TensorSpec"],
    "qeff_proxy.plugins": [
        "Hooks",
        "LoadedPlugin",
        "PackageEntry",
        "PluginReport",
        "PluginState",
        "Plugins",
    ],
    "qeff_proxy.request": ["Request", "refuse_others", "refuse_unused"],
    "qeff_proxy.sites": ["Absent", "Site"],
}


def test_every_module_is_found():
    package = importlib.import_module("qeff_proxy")
    names = {module.name for module in pkgutil.walk_packages(package.__path__, "qeff_proxy.")}
    assert names == {name for name in FILES if name.startswith("qeff_proxy.")}


@pytest.mark.parametrize("name", sorted(set(FILES) - ABSENT))
def test_what_a_module_declares_is_there(name):
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", [])
    assert len(set(declared)) == len(declared)
    assert [each for each in declared if each.startswith("_") or not hasattr(module, each)] == []


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_a_module_that_is_not_here_says_so(name):
    with pytest.raises(ImportError, match=f"^there is no {name}: .*\\.$"):
        importlib.import_module(f"{name}.any.thing")


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_names_that_others_rely_on_stay(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == RELIED_ON[name]
