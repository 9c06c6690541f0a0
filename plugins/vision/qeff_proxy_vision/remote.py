"""Load a checkpoint's own code with current transformers, without changing either.

1. While its modules are imported, `standing_in` replaces packages that inference does not need.
2. `adapted` subclasses the model class and adds what the current loader expects.

Nothing here runs unless the user trusts the checkpoint's code.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qeff_proxy.errors import CheckpointError
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

__all__ = ["adapted", "import_class", "load_adapted", "load_adapted_config", "standing_in"]


class _StandIn(nn.Identity):
    """Replaces a layer that does nothing in inference."""


@contextmanager
def standing_in(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Provide stand-ins for modules that are not installed, while the context is open.

    Args:
        modules: Dotted name of a module → its attributes by name. Installed packages are not
            replaced.
    """
    added: list[str] = []
    try:
        for name, attributes in modules.items():
            if name.split(".")[0] not in added and _is_installed(name.split(".")[0]):
                continue
            module = ModuleType(name)
            module.__path__ = []
            module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            vars(module).update(attributes)
            sys.modules[name] = module
            added.append(name)
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


#: The only use of ``timm``: a layer that drops paths in training.
DROP_PATH = {
    name: {"DropPath": _StandIn, "trunc_normal_": nn.init.trunc_normal_}
    for name in ("timm", "timm.models", "timm.models.layers", "timm.layers")
}


def import_class(folder: Path, reference: str, modules: Mapping[str, Mapping[str, Any]]) -> Any:
    """Import a class of the checkpoint's own code.

    Args:
        folder: The checkpoint.
        reference: ``module.Class``, as in the config's ``auto_map``.
        modules: Stand-ins (`standing_in`).

    Raises:
        CheckpointError: The code cannot be imported; names a missing package.
    """
    try:
        with standing_in(modules):
            return get_class_from_dynamic_module(reference, folder, local_files_only=True)
    except ImportError as error:
        line = next(iter(str(error).strip().splitlines()), "an import fails")
        raise CheckpointError(
            f"the code of {folder} cannot be imported: {line}",
            "Install what it needs: pip install 'qeff-proxy-vision[remote]'.",
        ) from error


def adapted(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a checkpoint's model class that the current loader can load.

    It runs ``post_init``, which older code did not need; its ``tie_weights`` accepts the current
    arguments if the old one takes none; and it can generate.
    """
    ties_without_arguments = len(inspect.signature(cls.tie_weights).parameters) < 2

    class Adapted(cls):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if not hasattr(self, "all_tied_weights_keys"):
                self.post_init()

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            if ties_without_arguments:
                super().tie_weights()
            else:
                super().tie_weights(*args, **kwargs)

    bases = (Adapted,) if issubclass(cls, GenerationMixin) else (Adapted, GenerationMixin)
    result: type[PreTrainedModel] = type(
        cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )
    return result


@contextmanager
def _silent() -> Iterator[None]:
    """Silence deprecation warnings about the checkpoint's code, which users cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_adapted_config(
    folder: Path, reference: str, modules: Mapping[str, Mapping[str, Any]]
) -> PreTrainedConfig:
    """The config of a checkpoint's own class, with rotary settings as older code expects them.

    Current transformers fills in settings for an unscaled rotary embedding; older code treats
    anything but ``None`` as a scaled one.

    Args:
        folder: The checkpoint.
        reference: ``module.Class`` of the config.
        modules: Stand-ins while its code is imported.
    """
    config_class = import_class(folder, reference, modules)
    with standing_in(modules), _silent():
        config: PreTrainedConfig = config_class.from_pretrained(folder)
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for each in (config, *inner):
        rotary = getattr(each, "rope_parameters", None) or {}
        plain = rotary.get("rope_type") == "default"
        if plain and not type(each).__module__.startswith("transformers."):
            each.rope_parameters = None
    return config


def load_adapted(
    folder: Path,
    auto_map: Mapping[str, str],
    modules: Mapping[str, Mapping[str, Any]],
    **arguments: Any,
) -> Any:
    """``from_pretrained`` of a checkpoint's own model class, adapted.

    Args:
        folder: The checkpoint.
        auto_map: From its config.
        modules: Stand-ins while its code is imported.
        arguments: Those of transformers' ``from_pretrained``.

    Raises:
        CheckpointError: The code cannot be imported, or has no model class.
    """
    offered = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
    reference = next((auto_map[name] for name in offered if name in auto_map), None)
    if reference is None or "AutoConfig" not in auto_map:
        raise CheckpointError(
            f"the config of {folder} names no model class of its own", "Check its auto_map."
        )
    config = load_adapted_config(folder, auto_map["AutoConfig"], modules)
    cls = adapted(import_class(folder, reference, modules))
    arguments.pop("trust_remote_code", None)
    # transformers takes a folder, or tensors without one
    source = None if arguments.get("state_dict") else folder
    with standing_in(modules), _silent():
        return cls.from_pretrained(source, config=config, **arguments)
