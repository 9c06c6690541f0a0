"""Load a checkpoint as ``from_pretrained`` was asked to: its revision, config, depth and dtype."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.arrays import dtype_name
from qeff_proxy.auto.qefficient import HUB
from qeff_proxy.common.messages import first_line, type_named
from qeff_proxy.common.quiet import quiet_logs
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.adapter_files import Adapters, find_model
from qeff_proxy.load.checkpoint_files import find_checkpoint, folder_named, read_config_file
from qeff_proxy.load.load_model import LoadedModel, load_config, load_model, wrap_model
from qeff_proxy.load.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What configs call a number of layers.
_DEPTHS = ("depth", "encoder_layers", "n_layer", "num_hidden_layers", "num_layers")
#: What configs say of a process, and not of the model.
_NOT_OF_THE_MODEL = (
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def load_checkpoint(
    source: str,
    task: Task,
    arguments: Mapping[str, Any],
    *,
    dtype: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapters: Adapters = (),
    adapter_as_input: bool = False,
) -> tuple[LoadedModel, Path | None, PreTrainedConfig | None]:
    """Load a checkpoint.

    Args:
        source: A local folder or a hub id.
        task: The task to load it for.
        arguments: ``revision``, ``cache_dir``, ``token``, ``gguf_file``, ``config``,
            ``torch_dtype`` and ``num_hidden_layers``; ``None`` asks for nothing.
        dtype: As in `load_model`, or ``"auto"`` for the checkpoint's own.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read pickled weights.
        adapters: As in `load_model`.
        adapter_as_input: As in `load_model`.

    Returns:
        The model; a temporary folder that it is read from, to be removed after its use; and its
        config. ``None`` where these are the checkpoint's own.

    Raises:
        CheckpointError: As `load_model`.
        UsageError: An argument contradicts another, or the checkpoint.
    """
    hub = {name: arguments[name] for name in HUB if arguments.get(name) is not None}
    asked, depth = arguments.get("config"), arguments.get("num_hidden_layers")
    named = [each for each in (dtype, arguments.get("torch_dtype")) if each is not None]
    if len({dtype_name(each) for each in named}) > 1:
        raise UsageError("dtype and torch_dtype say the same; give one of them")
    wanted = named[0] if named else None
    if arguments.get("gguf_file") is not None:
        source, hub = _gguf_file(source, str(arguments["gguf_file"]), hub), {}
    place, view, config = source, None, None
    unused, shallower = task.unused, False
    if hub or asked is not None or depth is not None or str(wanted) == "auto":
        trusts = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        if "revision" in hub and source.strip() and folder_named(source).is_dir():
            warnings.warn(
                f"revision is ignored: {source} is a local folder", UserWarning, stacklevel=3
            )
        folder = (
            find_checkpoint(source, **trusts, hub=hub)
            if hub
            else find_model(source, (), **trusts)[0]
        )
        config = there = load_config(folder)
        if str(wanted) == "auto":
            wanted = there.dtype
        if hub:
            place = str(folder)
        if asked is not None:
            config = asked = _config(asked)
            there = _read_as(asked, folder)
            if wanted is None and asked.dtype != there.dtype:
                wanted = asked.dtype
            asked, fewer = _at_full_depth(asked, there)
            depth = fewer if depth is None else depth
            if _of_the_model(asked) != _of_the_model(there):
                if find_model(place, (), **trusts)[1]:
                    raise UsageError(
                        f"config= changes the base model of the adapter in {source}",
                        "Name the base model, and the adapter in adapters=.",
                    )
                shallower = _is_shallower(asked.to_dict(), there.to_dict(), source)
                view = _with_config(folder, asked)
                place = str(view)
    try:
        if view is not None and shallower:
            trusted = trust_remote_code
            unused += _layers_left_out(folder, view, task.auto_class, trust_remote_code=trusted)
        loaded = load_model(
            place,
            auto_class=task.auto_class,
            dtype="float32" if wanted is None else dtype_name(wanted),
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            unused=unused,
            adapters=adapters,
            adapter_as_input=adapter_as_input,
        )
        loaded = replace(loaded, source=source)
        if depth is not None:
            from qeff_proxy.load.shortened_model import with_depth

            assert config is not None  # noqa: S101 (read above)
            config = copy.deepcopy(config)
            config.get_text_config(decoder=True).num_hidden_layers = depth
            loaded = with_depth(loaded, depth)
    except BaseException:
        remove_view(view)
        raise
    return loaded, view, config


def wrapped(model: Any) -> LoadedModel:
    """Wrap a transformers model like the result of `qeff_proxy.load.load_model`."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        what = repr(model) if isinstance(model, str) else type_named(model)
        raise UsageError(
            f"{what} is no transformers model",
            "Give one, or load a checkpoint with from_pretrained.",
        )
    return wrap_model(model)


def remove_view(view: Path | None) -> None:
    """Remove the temporary folder of `load_checkpoint`, if there is one."""
    if view is not None:
        shutil.rmtree(view, ignore_errors=True)


def _gguf_file(source: str, name: str, hub: Mapping[str, Any]) -> str:
    """The path of a GGUF file in a folder, or in a repository of the hub."""
    folder = folder_named(source)
    if not source.strip() or folder.exists():
        if source.strip() and (folder / name).is_file():
            return str(folder / name)
        raise CheckpointError(f"{source!r} holds no file {name!r}", "Check gguf_file.")
    from huggingface_hub import hf_hub_download

    try:
        with quiet_logs("huggingface_hub"):  # it notes each try
            return str(hf_hub_download(source, name, **hub))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the model hub does not give {name!r} of {source!r} ({first_line(error)})",
            "Check the names and the network, or download the file and name it as the model.",
        ) from error


def _config(asked: Any) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    if isinstance(asked, str | Path):
        return load_config(Path(asked).expanduser())
    if not isinstance(asked, PreTrainedConfig):
        raise UsageError(
            f"config is {type_named(asked)}", "Give a config of transformers, or its folder."
        )
    return asked


def _read_as(asked: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """The checkpoint's own config, of the class of the one that was asked for."""
    there = load_config(folder)
    if there.model_type != asked.model_type:
        raise UsageError(
            f"config is of model type {asked.model_type!r}, and the checkpoint of "
            f"{there.model_type!r}",
            "Take the checkpoint's own config, and change its values.",
        )
    # A class that came with the checkpoint fills in defaults that a plain config does not have.
    return there if type(there) is type(asked) else type(asked).from_pretrained(folder)


def _at_full_depth(
    asked: PreTrainedConfig, there: PreTrainedConfig
) -> tuple[PreTrainedConfig, int | None]:
    """The config with as many layers as the checkpoint has, and how many were asked for if fewer.

    The first layers of a checkpoint are read by number, as with ``num_layers`` of ``export``: a
    config alone does not say which of its lists are of layers.
    """
    asked = copy.deepcopy(asked)
    text, whole = asked.get_text_config(decoder=True), there.get_text_config(decoder=True)
    depth, full = (getattr(each, "num_hidden_layers", None) for each in (text, whole))
    if type(depth) is not int or type(full) is not int or depth >= full:
        return asked, None
    text.num_hidden_layers = full
    for name, value in whole.to_dict().items():
        cut = getattr(text, name, None)
        if isinstance(value, list) and isinstance(cut, list) and cut == value[:depth]:
            setattr(text, name, value)
    return asked, depth


def _is_shallower(asked: Mapping[str, Any], there: Mapping[str, Any], source: str) -> bool:
    """Whether a part of the config, such as that of an image tower, says fewer layers.

    Raises:
        UsageError: A part says more layers than the checkpoint has.
    """
    fewer = False
    for name, value in there.items():
        other = asked.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            fewer |= _is_shallower(other, value, source)
        elif name in _DEPTHS and isinstance(value, int) and isinstance(other, int):
            if other > value:
                raise UsageError(
                    f"config says {name} = {other}, and the checkpoint {source} has {value}",
                    "Ask for as many layers or fewer.",
                )
            fewer |= other < value
    return fewer


def _layers_left_out(
    folder: Path, view: Path, auto_class: str, *, trust_remote_code: bool
) -> tuple[str, ...]:
    """Globs of the weights of the last layers, which the model of another config does not have."""
    from torch import nn

    from qeff_proxy.load.transformers_model import model_on_meta

    def lists(place: Path) -> dict[str, int]:
        model = model_on_meta(
            place, read_config_file(place), auto_class, trust_remote_code=trust_remote_code
        )
        modules = model.named_modules()
        return {name: len(each) for name, each in modules if isinstance(each, nn.ModuleList)}

    fewer = lists(view)
    return tuple(
        f"{name}.{index}.*"
        for name, count in lists(folder).items()
        for index in range(fewer.get(name, count), count)
    )


def _of_the_model(config: Any) -> Any:
    """What a config says of the model, to be compared."""
    if isinstance(config, dict):
        return {
            name: _of_the_model(value)
            for name, value in config.items()
            if name not in _NOT_OF_THE_MODEL
        }
    return _of_the_model(config.to_dict()) if hasattr(config, "to_dict") else config


def _with_config(folder: Path, config: PreTrainedConfig) -> Path:
    """A temporary folder with links to the checkpoint's files, and another ``config.json``."""
    view = Path(tempfile.mkdtemp(prefix="qeff-proxy-config-"))
    for path in folder.iterdir():
        if path.name != "config.json":
            (view / path.name).symlink_to(path.resolve())
    (view / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    return view
