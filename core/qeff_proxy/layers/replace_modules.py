"""Exchange submodules of a model without touching the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def replace_modules(model: ModuleT, replacements: Mapping[str, nn.Module]) -> ModuleT:
    """A copy of ``model`` in which some submodules are others.

    Only the modules on the way to a replaced one are copied, and those shallowly: parameters,
    buffers and all other submodules are the very objects of ``model``, which stays as it was.

    Args:
        model: The model to copy from.
        replacements: Dotted path of a submodule → the module to put there.

    Returns:
        The copy.

    Raises:
        AttributeError: ``model`` has no submodule of that path.
    """
    result = _shallow_copy(model)
    copied: dict[str, nn.Module] = {"": result}
    for path, replacement in replacements.items():
        model.get_submodule(path)
        parent_path, _, name = path.rpartition(".")
        parent = _copied_parent(copied, parent_path)
        parent._modules[name] = replacement  # noqa: SLF001 (see _shallow_copy)
    return result


def _copied_parent(copied: dict[str, nn.Module], path: str) -> nn.Module:
    """The copy of the module at ``path``, made on the first call together with its parents."""
    if path not in copied:
        grandparent_path, _, name = path.rpartition(".")
        grandparent = _copied_parent(copied, grandparent_path)
        clone = _shallow_copy(grandparent.get_submodule(name))
        grandparent._modules[name] = clone  # noqa: SLF001 (see _shallow_copy)
        copied[path] = clone
    return copied[path]


def _shallow_copy(module: ModuleT) -> ModuleT:
    # nn.Module has no public way to copy a module without its submodules: these registries are
    # where it keeps them, and setattr would not let a submodule change its kind.
    clone = copy.copy(module)
    for registry in ("_modules", "_parameters", "_buffers"):
        clone.__dict__[registry] = dict(module.__dict__[registry])
    return clone
