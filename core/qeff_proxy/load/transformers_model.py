"""Read config and weights with transformers, and refuse what does not belong together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.common.private_names import build_model, model_classes
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.common.shared_change import one_model_at_a_time
from qeff_proxy.errors import CheckpointError, ProxyError, UnsupportedModelError
from qeff_proxy.load.checkpoint_files import GGUF_LINK, file_of_tensor, safetensors_files
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.tasks import UNUSED_WEIGHTS
from qeff_proxy.plugins.entry_points import find_entries, load_entry, pick_entry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.load.weight_sources import Weight

#: Entry points by model type: objects whose ``from_pretrained``, called as that of a transformers
#: auto class, loads checkpoints whose own code needs help on the transformers of today (with
#: ``state_dict`` among the arguments, from those tensors instead of the folder's files); they may
#: have a ``load_processor(folder)``, too, which gives None where it has nothing to give. They are
#: asked only when the user trusts that code.
REMOTE_CODE_GROUP = "qeff_proxy.remote_code"


class NotSampled(Exception):  # noqa: N818 (no error: the whole model is loaded instead)
    """A model cannot be known by its first layers; says why."""


_LONGEST_REASON = 300
#: How many weights without a use are named.
_SHOWN = 4
_REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


@one_model_at_a_time
def read_model(
    folder: Path,
    config_file: dict[str, Any],
    *,
    auto_class: str | None,
    dtype: str,
    trust_remote_code: bool,
    allow_pickle: bool,
    unused: tuple[str, ...],
    held: Mapping[str, Weight],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Read a checkpoint with transformers.

    Args:
        folder: Where it lies.
        config_file: Its ``config.json``.
        auto_class: As in `qeff_proxy.load.load_model`, as are the others.
        dtype: The dtype to load the weights in.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read pickled weights.
        unused: Globs of weights that it may lack, or hold for nothing.
        held: Its weights (`checkpoint_tensors`), empty where they are not in safetensors files.
        tensors: What to load instead of the tensors in its files, by their names there.

    Raises:
        CheckpointError: It cannot be read, or config and weights do not belong together.
        NotSampled: It cannot be loaded from ``tensors``.
        UnsupportedModelError: Its architecture is not one of the task asked for.
    """
    import torch
    import transformers

    from qeff_proxy.load.weight_sources import ComputedWeight

    files = safetensors_files(folder)
    loader = _loader(transformers, config_file, auto_class, trust_remote_code)
    arguments = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": "eager",
        "trust_remote_code": trust_remote_code,
        "use_safetensors": None if allow_pickle else True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, with the tensor's name
    }
    if tensors is None and not held and (folder / GGUF_LINK).is_symlink():
        settings = transformers.GgufConfig(dequantize=True)
        arguments.update(gguf_file=GGUF_LINK, quantization_config=settings, use_safetensors=None)
    try:
        with quiet_loading():
            if tensors is not None:
                model, notes = _load_tensors(loader, folder, tensors, arguments)
            elif config_file.get("quantization_config") or any(
                w.path not in files or isinstance(w, ComputedWeight) for w in held.values()
            ):
                weights = {key: weight.read() for key, weight in held.items()}
                model, notes = _load_tensors(loader, folder, weights, arguments)
            else:
                model, notes = loader.from_pretrained(folder, **arguments)
    except Exception as error:
        if tensors is not None:
            raise NotSampled(
                f"it cannot be loaded without its weights: {first_line(error)}"
            ) from error
        raise _loading_error(folder, config_file, loader, error) from error
    for tensor, found, wanted in sorted(notes.get("mismatched_keys", ())):
        raise CheckpointError(
            f"{tensor} in {file_of_tensor(folder, tensor)} has shape {list(found)}, where "
            f"{type(model).__name__} has {list(wanted)}",
            "Check that config.json and the weights belong together.",
        )
    _check_kinds(held, model)
    left_over = [name for name in notes.get("unexpected_keys", ()) if not _is_any(name, unused)]
    _check_left_over(folder, held, model, sorted(left_over))
    _check_missing(folder, model, sorted(notes.get("missing_keys", ())), unused)
    model.config.return_dict = True  # outputs are read by name, whatever the config asks for
    return model


def _load_tensors(
    loader: Any, folder: Path, tensors: Mapping[str, torch.Tensor], arguments: dict[str, Any]
) -> Any:
    """What ``from_pretrained`` gives for a checkpoint with other tensors than its files'."""
    from transformers import GenerationConfig

    kind, config = _class_of(loader, folder, trust_remote_code=arguments["trust_remote_code"])
    if config is None:
        return loader.from_pretrained(folder, state_dict=tensors, **arguments)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # ``tensors`` are what it describes, dequantized
    model, notes = kind.from_pretrained(None, config=config, state_dict=tensors, **arguments)
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, notes


def _class_of(loader: Any, folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class of the model that a loader gives, and its config.

    The config is ``None`` where the loader is no class of transformers.
    """
    import torch
    from transformers import AutoConfig

    if hasattr(loader, "config_class"):  # a model class
        return loader, loader.config_class.from_pretrained(folder)
    if not hasattr(loader, "from_config"):
        return loader, None
    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    if "--" in str(getattr(config, "auto_map", "")):
        raise ValueError("its code lies in another repository")
    # An auto class looks for remote code in the folder, which a caller may not pass to it.
    with torch.device("meta"):
        return type(loader.from_config(config, trust_remote_code=trust_remote_code)), config


@one_model_at_a_time
def model_on_meta(
    folder: Path, config_file: dict[str, Any], auto_class: str | None, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model that a checkpoint is of, without weights.

    Raises:
        CheckpointError: It cannot be built by its config.
        UnsupportedModelError: Its architecture is not one of the task asked for.
    """
    import torch
    import transformers

    loader = _loader(transformers, config_file, auto_class, trust_remote_code)
    try:
        with quiet_loading(), torch.device("meta"):
            kind, config = _class_of(loader, folder, trust_remote_code=trust_remote_code)
            if config is None:
                raise ValueError("the class of its own code is not known")
            model = build_model(kind, config, torch.float32)
            model.tie_weights()
    except Exception as error:  # models check, and reckon with, their configs in many ways
        raise _loading_error(folder, config_file, loader, error) from error
    return model


def _check_kinds(held: Mapping[str, Weight], model: PreTrainedModel) -> None:
    """Refuse integers where the model has floating point weights: their bits would mean nothing."""
    wanted = {name for name, one in model.named_parameters() if one.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    for key, weight in held.items():
        names = {key, prefix + key, key.removeprefix(prefix)}
        dtype = TORCH_DTYPES[weight.dtype]
        if not dtype.startswith(("float", "bfloat")) and names & wanted:
            raise CheckpointError(
                f"{key} in {weight.path} is said to be of {dtype}, where "
                f"{type(model).__name__} has floating point numbers",
                "Download the checkpoint again.",
            )


def _is_any(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch(name, glob) for glob in globs)


def _check_left_over(
    folder: Path, held: Mapping[str, Weight], model: PreTrainedModel, unexpected: list[str]
) -> None:
    """Refuse weights that the model has a place for but, by its config, does not use.

    That is a bias of a projection made without one, or a layer beyond the last. Modules that the
    model does not have at all (the head of another task) are named in a warning. Other leftovers
    (buffers of old releases) change nothing.
    """
    modules = dict(model.named_modules())
    tops = {model.base_model_prefix, *dict(model.named_children())}
    heads = [
        name
        for name in unexpected
        if name.partition(".")[0] not in tops and not _is_any(name, UNUSED_WEIGHTS)
    ]
    if heads:
        warnings.warn(
            f"{type(model).__name__} does not use {', '.join(heads[:_SHOWN])}"
            f"{'' if len(heads) <= _SHOWN else f' and {len(heads) - _SHOWN} more'} of {folder}: "
            "they belong to a head for another task",
            UserWarning,
            stacklevel=2,
        )
    for name in unexpected:
        path = name.rpartition(".")[0]
        owner = modules.get(path)
        lacks = owner is not None and any(True for _ in owner.parameters(recurse=False))
        while path and path not in modules:
            path = path.rpartition(".")[0]
        beyond = owner is None and type(modules.get(path)).__name__ == "ModuleList"
        if lacks and name.endswith(".bias") and name in held and not held[name].read().any():
            continue  # a bias of zeros, which some quantizers add, changes nothing
        if lacks or beyond:
            raise CheckpointError(
                f"{folder} holds {name}, which {type(model).__name__} built from its config.json "
                "does not use",
                "Check that config.json and the weights belong together.",
            )


def _check_missing(
    folder: Path, model: PreTrainedModel, missing: list[str], unused: tuple[str, ...]
) -> None:
    """Make sure that no weight that matters was made up."""
    missing = [name for name in missing if not _is_any(name, unused)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"among them {missing[0]}",
            "Download the checkpoint again; a model with made-up weights would mean nothing.",
        )


def _loader(
    transformers: Any, config: dict[str, Any], auto_class: str | None, trust_remote_code: bool
) -> Any:
    """What has the ``from_pretrained`` that loads this checkpoint."""
    if trust_remote_code and config.get("model_type") not in transformers.CONFIG_MAPPING:
        adapter = remote_code_adapter(str(config.get("model_type")))
        if adapter is not None:
            return adapter
        offered = config.get("auto_map") or {}
        if auto_class is not None and auto_class not in offered:
            auto_class = next((name for name in _REMOTE_CLASSES if name in offered), auto_class)
    if auto_class is not None:
        return getattr(transformers, auto_class)
    architectures = config.get("architectures") or []
    known = [getattr(transformers, str(name), None) for name in architectures]
    loader = next((found for found in known if found is not None), None)
    return loader or transformers.AutoModelForCausalLM


def class_named(config: Mapping[str, Any], auto_class: str | None) -> str:
    """The class that a checkpoint is loaded as: the same, whoever asks for it by whatever name.

    Args:
        config: What its ``config.json`` says.
        auto_class: As in `qeff_proxy.load.load_model`.
    """
    import transformers

    architectures = config.get("architectures") or [None]
    model_type = config.get("model_type")
    if config.get("auto_map") or model_type not in transformers.CONFIG_MAPPING:
        return str(auto_class)
    if auto_class is None:
        return str(architectures[0])
    found = model_classes(auto_class).get(transformers.CONFIG_MAPPING[model_type], None)
    classes = found if isinstance(found, list | tuple) else [found]
    names: list[str] = [one.__name__ for one in classes if one is not None]
    return next((name for name in names if name == architectures[0]), (names or [auto_class])[0])


def remote_code_adapter(model_type: str) -> Any:
    """What a package brings to load this model type's own code, or ``None``."""
    noun = "adapter for code of model type"
    entry = pick_entry(find_entries(REMOTE_CODE_GROUP)[0], noun, model_type)
    return None if entry is None else load_entry(entry, noun, lambda adapter: adapter)


def _loading_error(
    folder: Path, config: dict[str, Any], loader: Any, error: Exception
) -> ProxyError:
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModelError(
            f"{folder} holds a {config.get('model_type')!r} model, which {loader.__name__} "
            "cannot load",
            "Use the class for its task; qeff-proxy inspect names its architecture.",
        )
    if isinstance(error, ProxyError):
        return error
    if "weights_only" in str(error):  # torch advises to run whatever the pickle holds
        return CheckpointError(
            f"the pickled weights in {folder} are damaged, or hold more than tensors",
            "Download them again, as safetensors where there are any.",
        )
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}…"
    said = [name for name, value in config.items() if error.args and value == error.args[0]]
    if isinstance(error, KeyError) and said:
        reason = f"config.json says {said[0]} {error}, which transformers does not know"
    return CheckpointError(
        f"{folder} cannot be loaded by its config.json: {reason}",
        "Check that its files belong together; run with --debug for the whole trace.",
    )


_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)


def architecture_class(name: str, config: PreTrainedConfig) -> Any:
    """The model class called ``name``; ``None`` where nothing of that name is known.

    Args:
        name: As a checkpoint's ``architectures`` has it.
        config: Its config, by whose class packages register theirs with the auto classes.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is not None:
        return found
    for auto_class in _AUTO_CLASSES:
        kind = model_classes(auto_class).get(type(config), None)
        if getattr(kind, "__name__", None) == name:
            return kind
    return None
