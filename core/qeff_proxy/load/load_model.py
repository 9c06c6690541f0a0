"""Load: from a checkpoint to a model, its config and its processor."""

from __future__ import annotations

import difflib
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_proxy.arrays import dtype_name
from qeff_proxy.common.gc_threshold import collecting_rarely
from qeff_proxy.common.private_names import attention_of, model_classes
from qeff_proxy.common.quiet import without_warnings
from qeff_proxy.errors import CheckpointError, UnsupportedModelError, UsageError
from qeff_proxy.load.adapter_files import Adapter, Adapters, find_model
from qeff_proxy.load.adapter_inputs import NOTED, Shapes, as_inputs, made_with
from qeff_proxy.load.checkpoint_files import (
    check_identity,
    check_weights,
    identity_as,
    read_config_file,
    warn_of_others,
)
from qeff_proxy.load.config_checks import check_architectures, check_sizes
from qeff_proxy.load.tasks import TASKS, UNUSED_WEIGHTS, Task
from qeff_proxy.load.transformers_model import class_named, read_model
from qeff_proxy.parts import DTYPES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.layers.layer_lists import LayerList
    from qeff_proxy.load.first_layers import SampledModel
    from qeff_proxy.load.weight_sources import Weight

#: What configs call the number of positions of a decoder.
_POSITIONS = ("max_position_embeddings", "max_target_positions")


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
        sample: Gives the model with only its first layers there, as many as the function it is
            given says (`qeff_proxy.load.first_layers`); ``None`` for a model made in memory.
        notes: What ``export.json`` says of the model besides; filled when it is read.
        check_unchanged: Raises a `CheckpointError` if the files have changed since ``identity`` was
            computed.
        task: The task that the user named (a key of `TASKS`); ``None``: its architecture's.
        weights: What the checkpoint holds, by key (`checkpoint_tensors`); empty where its files are
            not safetensors.
        adapters: Those that it takes as inputs.
    """

    source: str
    folder: Path | None
    identity: str
    model_type: str
    dtype: str
    read: Callable[[], PreTrainedModel]
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    sample: Callable[[Callable[[LayerList], int]], SampledModel] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None
    task: str | None = None
    weights: Mapping[str, Weight] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode, with eager attention.

        Every architecture has eager attention, and every compiler takes its operators.

        Raises:
            CheckpointError: It cannot be read, or lacks weights.
            UnsupportedModelError: Its architecture is not one of the task asked for.
        """
        return self.read().eval()

    @property
    def is_read(self) -> bool:
        """Whether `model` was used: it is then what counts, since it may have been changed."""
        return "model" in vars(self)

    def forget(self) -> None:
        """Let go of the model; `model` reads it again."""
        vars(self).pop("model", None)


@collecting_rarely()
def load_model(
    source: str,
    *,
    task: str | None = None,
    auto_class: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    unused: tuple[str, ...] = UNUSED_WEIGHTS,
    adapters: Adapters = (),
    adapter_as_input: bool = False,
) -> LoadedModel:
    """Find a checkpoint and check its files; `LoadedModel.model` reads the weights.

    Args:
        source: A local folder or a hub id.
        task: A key of `TASKS`, whose class and unused weights it has then; ``None``: as the next
            arguments say.
        auto_class: The transformers auto class to load with, such as ``"AutoModelForCausalLM"``;
            ``None`` takes the architecture that the checkpoint names.
        dtype: One of `DTYPES`: the dtype to load the weights in.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read pickled weights, which can run code.
        unused: Globs of weights that are not used, so that a checkpoint may lack them, or hold
            them for nothing.
        adapters: Folders or hub ids of LoRA adapters that the weights are merged with, as
            ``PATH`` or ``PATH@WEIGHT``, or their weights by path.
        adapter_as_input: Take adapters like these as inputs, unmerged (`adapter_inputs`).

    Raises:
        CheckpointError: It cannot be found, read or trusted, or it lacks weights.
        UnsupportedModelError: transformers does not know its architecture.
        UsageError: ``dtype`` is none of `DTYPES`.
    """
    from qeff_proxy.load.checkpoint_tensors import checkpoint_tensors

    check_dtype(dtype)
    if task is not None:
        auto_class, unused = TASKS[task].auto_class, TASKS[task].unused
    folder, merged = find_model(
        source, adapters, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    shapes: Shapes = {}
    inputs: tuple[Adapter, ...] = ()
    if adapter_as_input:
        shapes, inputs, merged = as_inputs(merged, f"{source} ({folder})"), merged, ()
    config_file = read_config_file(folder)
    check_weights(folder, allow_pickle=allow_pickle)
    warn_of_others(folder)
    _check_architecture(config_file, source, trust_remote_code)
    check_architectures(folder / "config.json", config_file)
    if not config_file.get("auto_map"):
        check_sizes(folder, load_config(folder))
    held = checkpoint_tensors(folder, config_file)
    loaded_as = class_named(config_file, auto_class)
    places = [(adapter.folder, adapter.weight) for adapter in merged]
    identity = identity_as(folder, loaded_as, places)
    if merged:
        from qeff_proxy.load.merge_adapters import with_adapters
        from qeff_proxy.load.transformers_model import model_on_meta

        if not held:
            raise CheckpointError(
                f"the weights of {folder} are not read tensor by tensor, as adapters are merged",
                "Convert them to safetensors.",
            )
        model = model_on_meta(folder, config_file, auto_class, trust_remote_code=trust_remote_code)
        held = with_adapters(held, merged, model, f"{source} ({folder})")

    def check_unchanged() -> None:
        check_identity(folder, loaded_as, identity, places)

    def read(tensors: Mapping[str, torch.Tensor] | None = None) -> PreTrainedModel:
        model = read_model(
            folder,
            config_file,
            auto_class=auto_class,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            unused=unused,
            held=held,
            tensors=tensors,
        )
        if shapes:
            from qeff_proxy.session.adapter_slots import add_slots

            if problem := add_slots(model, shapes):
                raise CheckpointError(f"an adapter is for {problem}", "Name the model it is for.")
        check_unchanged()
        return model

    def sample(choose: Callable[[LayerList], int]) -> SampledModel:
        from qeff_proxy.load.first_layers import sample_model

        return sample_model(folder, held, read, choose)

    model_type = str(config_file.get("model_type"))
    notes: dict[str, Any] = {NOTED: made_with(inputs)} if inputs else {}
    if places:
        notes["adapters"] = [{"path": str(path), "weight": weight} for path, weight in places]
    return LoadedModel(
        source,
        folder,
        identity_with(identity, {NOTED: [shapes, made_with(inputs)] if shapes else None}),
        model_type,
        dtype,
        read,
        trust_remote_code,
        sample=sample,
        check_unchanged=check_unchanged,
        weights=held,
        task=task,
        notes=notes,
        adapters=inputs,
    )


def with_options(loaded: LoadedModel, options: Mapping[str, Any]) -> LoadedModel:
    """The model with what its ``build_proxy`` hook is to be told; the identity changes with it.

    Args:
        loaded: The model.
        options: JSON values and functions; ``None`` values are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    identity = identity_with(loaded.identity, given)
    return replace(loaded, identity=identity, options={**loaded.options, **given})


def identity_with(identity: str, options: Mapping[str, Any]) -> str:
    """The identity of a model with options, as `with_options` takes them."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return identity
    text = json.dumps(given, sort_keys=True, default=_describe_function)
    return hashlib.sha256(f"{identity}\0{text}".encode()).hexdigest()


def _describe_function(function: Any) -> str:
    """What tells a function from another: its code and what it closes over."""
    code = getattr(function, "__code__", None)
    if code is None:  # an object with values of its own, which cannot be compared
        return uuid.uuid4().hex
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{function.__qualname__} {code.co_code.hex()} {code.co_consts} {code.co_names} {cells}"


def wrap_model(model: PreTrainedModel, source: str | None = None) -> LoadedModel:
    """Take a model that was made in memory; its identity is the hash of its weights."""
    identity = _identity_of(model)
    if attention_of(model) != "eager":
        model.set_attn_implementation("eager")
    name = source or model.config.name_or_path or model.config.model_type
    dtype = check_dtype(model.dtype)
    return LoadedModel(name, None, identity, model.config.model_type, dtype, lambda: model)


def as_in_memory(loaded: LoadedModel) -> LoadedModel:
    """The model as it is in memory now: it may have been changed since its identity was computed.

    A checkpoint's model that was not changed gets another identity than its files, too: to tell
    would take to read them again.
    """
    model = loaded.model
    digest = hashlib.sha256(f"{loaded.identity}\0{_identity_of(model)}".encode())
    return replace(loaded, identity=digest.hexdigest(), read=lambda: model, sample=None, weights={})


def _identity_of(model: PreTrainedModel) -> str:
    """A hash of config, modules and weights."""
    from qeff_proxy.arrays import to_array

    digest = hashlib.sha256(f"{model.config.to_json_string()}\0{model}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(to_array(tensor).tobytes())
    return digest.hexdigest()


def architecture_of(loaded: LoadedModel) -> str | None:
    """The architecture in a checkpoint's config, or the class of a model made in memory."""
    if loaded.folder is None:
        return type(loaded.model).__name__
    architectures = read_config_file(loaded.folder).get("architectures")
    return str(architectures[0]) if architectures else None


def is_class_of(architecture: str, model_type: str, auto_class: str) -> bool:
    """Whether an auto class of transformers makes this architecture for the model type.

    Of the base models that ``AutoModel`` makes, only those that take token ids count.
    """
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return False
    classes = model_classes(auto_class).get(transformers.CONFIG_MAPPING[model_type], ())
    classes = classes if isinstance(classes, list | tuple) else (classes,)
    if auto_class == "AutoModel":
        classes = [kind for kind in classes if kind.main_input_name == "input_ids"]
    return architecture in {kind.__name__ for kind in classes}


def flow_of(loaded: LoadedModel) -> str | None:
    """The flow of a checkpoint's task, or of its architecture's; ``None`` if that names none."""
    if loaded.task is not None:
        return flow_as(loaded, TASKS[loaded.task])
    name = architecture_of(loaded)
    tasks = TASKS.values()
    fitting = (t for t in tasks if name and is_class_of(name, loaded.model_type, t.auto_class))
    task = next(fitting, None)
    return None if task is None else flow_as(loaded, task)


def flow_as(loaded: LoadedModel, task: Task) -> str:
    """The flow of a checkpoint as a model of a task."""
    if not task.without_encoder:
        return task.flows[0]
    config = loaded.model.config if loaded.folder is None else load_config(loaded.folder)
    return task.flows[0] if config.is_encoder_decoder else task.without_encoder


def load_config(folder: Path) -> PreTrainedConfig:
    """The config in ``folder``, without running code that a checkpoint brought.

    A model type that transformers does not know gives a plain config with the file's values.

    Raises:
        CheckpointError: It is missing, or transformers refuses its values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    values = read_config_file(folder)
    try:
        if values.get("model_type") in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(folder, return_dict=True)
        return PreTrainedConfig.from_dict(values)
    except Exception as error:  # configs check, and reckon with, their values in many ways
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be used: {type(error).__name__}: {error}",
            "Correct it, or download it again.",
        ) from error


def most_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a decoder of this config has; ``None`` where it has no limit."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in _POSITIONS)
    most = next((count for count in found if isinstance(count, int) and count > 0), None)
    rope = getattr(text, "rope_parameters", None) or {}
    if most is not None and rope.get("rope_type") == "dynamic":
        return int(most * rope.get("factor", 1))  # made for more positions than it was trained with
    return most


def check_dtype(dtype: str | torch.dtype) -> str:
    """The dtype's name, if a model can be exported in it (`UsageError` if not)."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return name


def _check_architecture(config: dict[str, Any], source: str, trust_remote_code: bool) -> None:
    """Refuse what transformers cannot build, before it tries."""
    with without_warnings():  # it warns in notebooks without ipywidgets, and shows the same bars
        import_module("tqdm.auto")
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        from qeff_proxy.plugins.manager import Plugins

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
