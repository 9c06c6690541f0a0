"""Find the LoRA adapters of a model, and check what their configs say.

Format: peft's ``adapter_config.json`` (``peft.LoraConfig``) and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import CheckpointError, UsageError
from qeff_proxy.load.checkpoint_files import find_checkpoint, folder_named, has_weights
from qeff_proxy.load.gguf_files import gguf_file_of, unpack_gguf
from qeff_proxy.load.safetensors_header import StoredTensor, read_header

_MOST = 1e38  # about what float32 holds
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: How ``adapters=`` may be given: ``PATH`` or ``PATH@WEIGHT``, several, or weights by path.
Adapters = str | Path | Iterable[str | Path] | Mapping[str, float]

#: Settings that are obeyed, or that say how an adapter was trained and nothing about its merge.
_UNDERSTOOD = re.compile(
    "peft_(type|version)|task_type|inference_mode|auto_mapping|base_model_name_or_path|revision|r"
    "|target_modules|exclude_modules|modules_to_save|layers_to_transform|layers_pattern|bias"
    "|lora_(alpha|dropout|bias)|(rank|alpha)_pattern|use_(rslora|dora)|fan_in_fan_out"
    "|init_lora_weights|(loftq|eva|corda|lora_ga|runtime)_config|ensure_weight_tying"
    "|megatron_core|qalora_group_size"
)
#: Values of ``init_lora_weights`` that change the base model's weights, which are not saved.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: Where its two files lie.
        weight: What its changes are multiplied by.
        settings: Its ``adapter_config.json``.
    """

    folder: Path
    weight: float
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS

    def scale(self, module: str) -> float:
        """What B @ A of a module is multiplied by, without `weight`."""
        alpha = self._of_pattern("alpha_pattern", "lora_alpha", module)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        """The rank that the config gives a module."""
        return int(self._of_pattern("rank_pattern", "r", module))

    def targets(self, module: str) -> bool:
        """Whether the config names this module, as ``peft`` reads it."""
        settings = self.settings
        targets = settings.get("target_modules")
        if _names(settings.get("exclude_modules"), module) or targets is None:
            return False
        if isinstance(targets, str):
            return targets == "all-linear" or _names(targets, module)
        layers = settings.get("layers_to_transform")
        if module in targets or not _names(targets, module) or layers in (None, []):
            return _names(targets, module)
        patterns = settings.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        numbers = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns)
        number = next((int(match[1]) for match in numbers if match), None)
        return number in (layers if isinstance(layers, list) else [layers])

    def _of_pattern(self, patterns: str, default: str, module: str) -> float:
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.settings.get(default, 8))  # peft's own default of both


def header_of(adapter: Adapter) -> dict[str, StoredTensor]:
    """Where the tensors of an adapter lie in its file, by their names.

    Raises:
        CheckpointError: The file is damaged, or holds none.
    """
    try:
        header = read_header(adapter.path)
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{adapter.path} is damaged: {first_line(error)}", "Download the adapter again."
        ) from error
    if not header:
        raise CheckpointError(f"{adapter.path} holds no tensors", "Download the adapter again.")
    return header


def warn_of_base(adapters: Iterable[Adapter], name: str) -> None:
    """Warn of adapters that were made for another model than the one that is called ``name``."""
    for adapter in adapters:
        base = Path(str(adapter.settings.get("base_model_name_or_path") or "")).name
        if base and base.lower() not in name.lower():
            warnings.warn(
                f"the adapter {adapter.folder} was made for {base}, and is used with {name}",
                UserWarning,
                stacklevel=4,
            )


def _names(names: str | list[str] | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def find_model(
    source: str, adapters: Adapters = (), *, allow_pickle: bool, trust_remote_code: bool
) -> tuple[Path, tuple[Adapter, ...]]:
    """The folder of a checkpoint, and the adapters that its weights are merged with.

    A folder that holds an adapter and no other weights stands for the adapter's base model, merged
    with it; an adapter beside the weights of its base model is merged with these.

    Args:
        source: A local folder or a hub id, or a GGUF file.
        adapters: Further adapters; a hub id is one, too.
        allow_pickle: As for `find_checkpoint`.
        trust_remote_code: As for `find_checkpoint`.

    Raises:
        CheckpointError: A folder cannot be found, or its adapter is none that can be merged.
        UsageError: A weight is no finite number.
    """
    find = partial(_find, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    folder = find(source)
    found = []
    if (folder / CONFIG).exists():
        found.append(read_adapter(folder, 1.0))
        if not has_weights(folder):
            base = found[0].settings.get("base_model_name_or_path")
            if not base or found[0].settings.get("revision"):
                raise CheckpointError(
                    f"{folder / CONFIG} names no base model"
                    + (f" but revision {found[0].settings['revision']} of {base}" if base else ""),
                    "Name the base model, and this folder with --adapter.",
                )
            try:
                folder = find(str(base))
            except CheckpointError as error:
                raise CheckpointError(
                    f"the base model that {folder / CONFIG} names is not found: {error.problem}",
                    "Name the base model, and this folder with --adapter.",
                ) from error
            if (folder / CONFIG).exists():
                raise CheckpointError(
                    f"{found[0].folder / CONFIG} names the base model {base}, an adapter itself",
                    f"Name its base model, and both adapters with --adapter: {base} first.",
                )
    for path, weight in parse_adapters(adapters):
        place = find_checkpoint(path, allow_pickle=False, trust_remote_code=False)
        found.append(read_adapter(place, weight))
    return folder, tuple(found)


def _find(source: str, *, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The folder of a checkpoint, or one made of a GGUF file."""
    file = gguf_file_of(folder_named(source)) if source.strip() else None
    if file is not None:
        return unpack_gguf(file)
    return find_checkpoint(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def parse_adapters(adapters: Adapters) -> list[tuple[str, float]]:
    """Path and weight of each adapter.

    Raises:
        UsageError: A weight is no finite number.
    """
    if isinstance(adapters, Mapping):
        pairs = [(str(path), weight) for path, weight in adapters.items()]
    else:
        several = [adapters] if isinstance(adapters, str | Path) else adapters
        pairs = [_path_and_weight(str(adapter)) for adapter in several]
    for path, weight in pairs:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not abs(weight) < _MOST:
            raise UsageError(
                f"the adapter {path} has weight {weight!r}", f"Give a finite number below {_MOST}."
            )
    return [(path, float(weight)) for path, weight in pairs]


def _path_and_weight(text: str) -> tuple[str, float]:
    path, at, weight = text.rpartition("@")
    if not at or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise UsageError(
            f"the adapter {text} has weight {weight!r}", "Write PATH@WEIGHT with a number."
        ) from error


def read_adapter(folder: Path, weight: float) -> Adapter:
    """Read an adapter's config, and refuse what cannot be merged, by its name in the config."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = "is missing" if not path.exists() else f"is no JSON object: {first_line(error)}"
        raise CheckpointError(f"{path} {reason}", "Name the folder of a LoRA adapter.") from error
    problem = None
    start = str(settings.get("init_lora_weights")).lower()
    unknown = sorted(n for n in settings if settings[n] and not _UNDERSTOOD.fullmatch(n))
    if kind != "LORA":
        problem = f"has peft_type {kind}, which is not merged here"
    elif start.startswith(_CHANGES_BASE):
        problem = f"has init_lora_weights {start!r}, which changed the base model's weights"
    elif unknown:
        problem = f"sets {unknown[0]}, which is not merged here"
    elif settings.get("bias", "none") not in {"none", "all", "lora_only"}:
        problem = f"sets bias {settings['bias']!r}, which is not known"
    if problem is not None:
        raise CheckpointError(
            f"{path} {problem}",
            "Merge the adapter with peft (merge_and_unload), save the result, and name its folder; "
            "for the base model alone, name a folder without adapter_config.json.",
        )
    adapter = Adapter(folder, weight, settings)
    try:
        if adapter.scale("") * 0 != 0 or not isinstance(settings.get("bias", ""), str):
            raise ValueError("its scale is not finite")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in (settings.get(name) or {}).items():
                re.compile(pattern), 1 / float(value)
        adapter.targets("layers.0.module")
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise CheckpointError(
            f"{path} has values that cannot be right: {first_line(error)}",
            "Download the adapter again.",
        ) from error
    if not adapter.path.is_file():
        raise CheckpointError(
            f"{adapter.path} is missing",
            "Adapters are read as safetensors: save it anew with peft (save_pretrained).",
        )
    return adapter
