"""Write the package of a new plugin from templates."""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Any

from qeff_proxy.common.atomic_folder import staged_folder
from qeff_proxy.common.file_errors import writing
from qeff_proxy.errors import UsageError
from qeff_proxy.hookspecs import HOOK_API_VERSION
from qeff_proxy.plugins.manager import Plugins

KINDS = ("text", "embedding", "audio", "vision")

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LONGEST_NAME = 100
_MODEL_TYPE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class NewPlugin:
    """A new package.

    Attributes:
        folder: Its folder.
        model_type: The model type it serves.
        files: Its files, relative to the folder.
        note: What its author must fill in, or ``None``.
    """

    folder: Path
    model_type: str
    files: tuple[str, ...]
    note: str | None = None


def write_plugin(name: str, like: str, folder: Path, model_type: str | None = None) -> NewPlugin:
    """Write a plugin package that passes the conformance suite.

    If transformers does not know the model type, or cannot create a tiny model of it, the paths of
    embedding and head are a guess that the author has to correct; `NewPlugin.note` says so.

    Args:
        name: Of the distribution, such as ``acme-models``.
        like: The kind of family, one of `KINDS`.
        folder: The folder to write; it must not exist.
        model_type: The model type to serve; by default one of transformers' that no package of this
            project serves, as an example.

    Raises:
        UsageError: A name cannot be used, the folder exists, another package serves the model
            type, or transformers knows it as a model for another task.
    """
    source = files("qeff_proxy.testing") / "templates" / "plugin"
    kind = json.loads((source / "kinds.json").read_text(encoding="utf-8"))[like]
    package = _package_of(name)
    served = model_type or kind["model_type"]
    _check_model_type(served)
    with writing(folder):
        exists = folder.exists()
    if exists:
        raise UsageError(f"{folder} exists already", "Name another folder with --output.")
    note = None
    if served != kind["model_type"]:
        sites, note = _sites_of(served, kind)
        kind |= sites
    module = re.sub(r"\W", "_", served)
    if module[0].isdigit() or keyword.iskeyword(module):
        module = f"model_{module}"
    words = {
        **kind,
        "name": name,
        "package": package,
        "module": module,
        "model_type": served,
        "requires": json.dumps(kind["requires"]),
        "title": "".join(word.capitalize() for word in re.split(r"\W|_", served)),
        "api": HOOK_API_VERSION,
    }
    targets = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": "init.py",
        f"{package}/{module}.py": f"{like}.py",
        "tests/test_conformance.py": f"{like}_test.py",
    }
    if note is not None:
        note = f"{note} Set the sites in {package}/{module}.py."
    return replace(_write(source, folder, targets, words), note=note)


def _write(
    source: Traversable, folder: Path, targets: dict[str, str], words: dict[str, Any]
) -> NewPlugin:
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder, "pyproject.toml") as staged:
        for target, template in targets.items():
            path = staged / target
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (source / f"{template}.tmpl").read_text(encoding="utf-8")
            path.write_text(Template(text).substitute(words), encoding="utf-8")
    return NewPlugin(folder, words["model_type"], tuple(targets))


def _package_of(name: str) -> str:
    """The name of the Python package for a distribution's name."""
    hint = "Use letters, digits and hyphens, such as acme-models."
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a package", hint)
    package = re.sub(r"[-.]+", "_", name).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise UsageError(f"{name!r} gives no name that Python can import ({package})", hint)
    if package in sys.stdlib_module_names or package in ("tests", "qeff_proxy", "transformers"):
        raise UsageError(f"{name!r} is the name of a package that is there already", hint)
    if len(name) > _LONGEST_NAME:
        raise UsageError(f"{name[:20]!r}… has {len(name)} characters", "Choose a shorter name.")
    spec = importlib.util.find_spec(package)
    # A folder of that name without `__init__.py` has a spec without an origin.
    if spec is not None and spec.origin is not None:
        raise UsageError(f"{package!r} is the name of a package that is installed here", hint)
    return package


def _check_model_type(model_type: str) -> None:
    if not _MODEL_TYPE.fullmatch(model_type):
        raise UsageError(
            f"{model_type!r} is no model type",
            "It is the model_type of a checkpoint's config.json, such as my-model.",
        )
    for entry in Plugins.discover({}).entries:
        if entry.name == model_type:
            raise UsageError(
                f"model type {model_type!r} is served by {entry.distribution} already",
                "Name another with --model-type, or uninstall that package.",
            )


def _sites_of(model_type: str, kind: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The paths of embedding and head of a model type; or the kind's, and why that is a guess."""
    import torch
    import transformers

    from qeff_proxy.testing.tiny import tiny_config

    sites = {"embedding": kind["embedding"], "lm_head": kind["lm_head"]}
    if model_type not in transformers.CONFIG_MAPPING:
        return sites, (
            f"transformers knows no model type {model_type!r}: register your classes with its auto "
            "classes in a module of the package, which the module of the hooks imports."
        )
    if transformers.CONFIG_MAPPING[model_type] not in getattr(transformers, kind["mapping"]):
        raise UsageError(
            f"transformers makes no {kind['auto_class']} for model type {model_type!r}",
            "Choose another --like, or name a model type of that kind.",
        )
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            model = getattr(transformers, kind["auto_class"]).from_config(config)
    except Exception as error:  # noqa: BLE001 (configs refuse sizes in many ways)
        line = " ".join(str(error).split())[:150]
        return sites, (
            f"transformers made no tiny {model_type} ({type(error).__name__}: {line}): give sizes "
            "that it takes in the test."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    for site, getter in (
        ("embedding", model.get_input_embeddings),
        ("lm_head", model.get_output_embeddings),
    ):
        path = paths.get(id(getter())) if sites[site] else None
        sites[site] = path or sites[site]
    return sites, None
