"""Load: from a checkpoint to a model, its config and its processor."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qeff_proxy.checkpoint import (
    check_weights,
    checkpoint_identity,
    find_checkpoint,
    read_config_file,
)
from qeff_proxy.errors import CheckpointError, PluginError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "DTYPES",
    "REMOTE_CODE_GROUP",
    "LoadedModel",
    "load_config",
    "load_model",
    "load_processor",
    "with_options",
    "wrap_model",
]

#: Entry points by model type: objects whose ``from_pretrained``, called as that of a transformers
#: auto class, loads checkpoints whose own code needs help on the transformers of today. They are
#: asked only when the user trusts that code.
REMOTE_CODE_GROUP = "qeff_proxy.remote_code"
_REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "*.tiktoken", "*.jsonl", "merges.txt")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

#: The dtypes a model can be exported in.
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class LoadedModel:
    """A model, ready to be cut. Its weights are read when `model` is first used.

    Attributes:
        source: What the user named it by.
        folder: Where its files lie; ``None`` for a model made in memory.
        identity: A hash that changes when the checkpoint, or the way it is loaded, does.
        model_type: The config's model type: what plugins are found by.
        dtype: The dtype of the weights, as torch spells it.
        read: Gives the model.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        options: What the ``build_proxy`` hook is told (JSON values and functions); whoever sets
            it changes ``identity`` with it.
    """

    source: str
    folder: Path | None
    identity: str
    model_type: str
    dtype: str
    read: Callable[[], PreTrainedModel]
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode, with eager attention.

        Every architecture has eager attention, and every compiler takes its operators.

        Raises:
            CheckpointError: It cannot be read, or lacks weights.
            UnsupportedModelError: Its architecture is not one of the task asked for.
        """
        return self.read().eval()


def load_model(
    source: str,
    *,
    auto_class: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    unused: tuple[str, ...] = (),
) -> LoadedModel:
    """Find a checkpoint and check its files; `LoadedModel.model` reads the weights.

    Args:
        source: A local folder or a hub id.
        auto_class: The transformers auto class to load with, such as ``"AutoModelForCausalLM"``;
            ``None`` takes the architecture that the checkpoint names.
        dtype: One of `DTYPES`: the dtype to load the weights in.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read pickled weights, which can run code.
        unused: Globs of weights that the task does not use, so that a checkpoint may lack them.

    Raises:
        CheckpointError: It cannot be found, read or trusted, or it lacks weights.
        UnsupportedModelError: transformers does not know its architecture.
        UsageError: ``dtype`` is none of `DTYPES`.
    """
    check_dtype(dtype)
    folder = find_checkpoint(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    config_file = read_config_file(folder)
    check_weights(folder, allow_pickle=allow_pickle)
    _check_architecture(config_file, source, trust_remote_code)
    digest = hashlib.sha256(f"{checkpoint_identity(folder)}\0{auto_class}".encode())

    def read() -> PreTrainedModel:
        model, missing = _read_model(
            folder, config_file, auto_class, dtype, trust_remote_code, allow_pickle
        )
        _check_missing(folder, model, missing, unused)
        return model

    model_type = str(config_file.get("model_type"))
    return LoadedModel(
        source, folder, digest.hexdigest(), model_type, dtype, read, trust_remote_code
    )


def _read_model(
    folder: Path,
    config_file: dict[str, Any],
    auto_class: str | None,
    dtype: str,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> tuple[PreTrainedModel, list[str]]:
    """Read config and weights with transformers; give the names of those that are not there."""
    import torch
    import transformers

    loader = _loader(transformers, config_file, auto_class, trust_remote_code)
    try:
        with _quiet_loading():
            model, notes = loader.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
            )
    except Exception as error:
        raise _loading_error(folder, config_file, loader, error) from error
    for tensor, found, wanted in sorted(notes.get("mismatched_keys", ())):
        raise CheckpointError(
            f"{tensor} in {folder} has shape {list(found)}, where {type(model).__name__} has "
            f"{list(wanted)}",
            "Check that config.json and the weights belong together.",
        )
    _check_left_over(folder, model, sorted(notes.get("unexpected_keys", ())))
    return model, sorted(notes.get("missing_keys", ()))


def _check_left_over(folder: Path, model: PreTrainedModel, unexpected: list[str]) -> None:
    """Refuse weights that the model has a place for but, by its config, does not use.

    That is a bias of a projection made without one, or a layer beyond the last. Other leftovers
    (heads of another task, buffers of old releases) change nothing.
    """
    modules = dict(model.named_modules())
    for name in unexpected:
        path = name.rpartition(".")[0]
        owner = modules.get(path)
        lacks = owner is not None and any(True for _ in owner.parameters(recurse=False))
        while path and path not in modules:
            path = path.rpartition(".")[0]
        beyond = owner is None and type(modules.get(path)).__name__ == "ModuleList"
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
    missing = [name for name in missing if not any(fnmatch(name, glob) for glob in unused)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"among them {missing[0]}",
            "Download the checkpoint again; a model with made-up weights would mean nothing.",
        )


def with_options(loaded: LoadedModel, options: Mapping[str, Any]) -> LoadedModel:
    """The model with what its ``build_proxy`` hook is to be told; the identity changes with it.

    Args:
        loaded: The model.
        options: JSON values and functions; ``None`` values are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return loaded
    text = json.dumps(given, sort_keys=True, default=_describe_function)
    identity = hashlib.sha256(f"{loaded.identity}\0{text}".encode()).hexdigest()
    return replace(loaded, identity=identity, options={**loaded.options, **given})


def _describe_function(function: Any) -> str:
    """What tells a function from another: its code and what it closes over."""
    code = getattr(function, "__code__", None)
    if code is None:  # an object with values of its own, which cannot be compared
        return uuid.uuid4().hex
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{function.__qualname__} {code.co_code.hex()} {code.co_consts} {code.co_names} {cells}"


def wrap_model(model: PreTrainedModel, source: str | None = None) -> LoadedModel:
    """Take a model that was made in memory; its identity is the hash of its weights."""
    from qeff_proxy.arrays import to_array

    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(to_array(tensor).tobytes())
    if model.config._attn_implementation != "eager":  # noqa: SLF001 (the only place it is kept)
        model.set_attn_implementation("eager")
    name = source or model.config.name_or_path or model.config.model_type
    dtype = check_dtype(model.dtype)
    return LoadedModel(
        name, None, digest.hexdigest(), model.config.model_type, dtype, lambda: model
    )


def load_config(folder: Path) -> PreTrainedConfig:
    """The config in ``folder``, without running code that a checkpoint brought.

    A model type that transformers does not know gives a plain config with the file's values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    values = read_config_file(folder)
    if values.get("model_type") in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(folder)
    return PreTrainedConfig.from_dict(values)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's processor or tokenizer.

    Raises:
        CheckpointError: It has none that can be loaded.
    """
    import transformers

    # Without any of its files, transformers makes an empty tokenizer for some model types.
    kinds = ["AutoTokenizer"] if _any_file(folder, _TOKENIZER_FILES) else []
    if _any_file(folder, _PROCESSOR_FILES):
        kinds.insert(0, "AutoProcessor")
    reasons = [] if kinds else ["it has none of the files of one"]
    for kind in kinds:
        try:
            with _quiet_loading():
                return getattr(transformers, kind).from_pretrained(
                    folder, trust_remote_code=trust_remote_code, local_files_only=True
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reasons.append(str(error).strip().splitlines()[0] if str(error) else repr(error))
    raise CheckpointError(
        f"{folder} has no tokenizer that can be loaded ({reasons[-1]})",
        "Add its tokenizer files (tokenizer.json, tokenizer_config.json), or give token ids: "
        'inputs={"input_ids": …}.',
    )


def _any_file(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def check_dtype(dtype: str | torch.dtype) -> str:
    """The dtype's name, if a model can be exported in it (`UsageError` if not)."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return name


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Leave out transformers' progress bars and load reports; what matters is checked here."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    showed_bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if showed_bars:
            transformers_logging.enable_progress_bar()


def _check_architecture(config: dict[str, Any], source: str, trust_remote_code: bool) -> None:
    """Refuse what transformers cannot build, before it tries."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        from qeff_proxy.plugins import Plugins

        Plugins.discover().import_for(str(model_type))  # a package may bring the architecture
    if config.get("auto_map") and model_type not in CONFIG_MAPPING:
        if not trust_remote_code:
            raise CheckpointError(
                f"{source} brings its own Python code (model type {model_type!r})",
                "Read that code, and pass --trust-remote-code if you trust it.",
            )
        return
    if model_type in CONFIG_MAPPING:
        return
    near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1, cutoff=0.5)
    nearest = f"The nearest is {near[0]!r}. " if near else ""
    raise UnsupportedModelError(
        f"{source} has model type {model_type!r}, which transformers does not know",
        f"{nearest}A plugin package can bring an architecture: see the plugin guide.",
    )


def _loader(
    transformers: Any, config: dict[str, Any], auto_class: str | None, trust_remote_code: bool
) -> Any:
    """What has the ``from_pretrained`` that loads this checkpoint."""
    if trust_remote_code and config.get("model_type") not in transformers.CONFIG_MAPPING:
        adapter = _remote_code_adapter(str(config.get("model_type")))
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


def _remote_code_adapter(model_type: str) -> Any:
    """What a package brings to load this model type's own code, or ``None``."""
    from importlib_metadata import entry_points

    found = entry_points(group=REMOTE_CODE_GROUP)
    if model_type not in found.names:
        return None
    try:
        return found[model_type].load()
    except Exception as error:
        raise PluginError(
            f"the adapter for code of model type {model_type!r} ({found[model_type].value}) "
            f"cannot be used: {type(error).__name__}: {error}"
        ) from error


def _loading_error(
    folder: Path, config: dict[str, Any], loader: Any, error: Exception
) -> CheckpointError | UnsupportedModelError:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModelError(
            f"{folder} holds a {config.get('model_type')!r} model, which {loader.__name__} "
            "cannot load",
            "Use the class for its task; qeff-proxy inspect names its architecture.",
        )
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(
        f"{folder} cannot be loaded: {type(error).__name__}: {line}",
        "Check that its files belong together; run with --debug for the whole trace.",
    )
