"""Merge LoRA adapters into the weights of a checkpoint, as each weight is read.

W + scale * weight * B @ A, as ``peft``'s ``merge_and_unload`` computes it
(``peft.tuners.lora.layer.Linear.merge``, for DoRA ``peft.tuners.lora.variants``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.adapter_files import CONFIG, Adapter, header_of, warn_of_base
from qeff_proxy.load.safetensors_header import TORCH_DTYPES
from qeff_proxy.load.weight_sources import (
    ComputedWeight,
    StoredWeight,
    Weight,
    aliases_of,
    model_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What peft puts before a module's path.
_PREFIX = "base_model.model."
#: Tensors that change a module, by the ends of their names.
_CHANGE = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


def with_adapters(
    held: Mapping[str, Weight], adapters: Sequence[Adapter], model: PreTrainedModel, name: str
) -> dict[str, Weight]:
    """The weights of a checkpoint, merged with adapters.

    Args:
        held: The weights, by key (`checkpoint_tensors`).
        adapters: In the order in which they are merged.
        model: The model that the checkpoint is of; its weights may be on the meta device.
        name: What the checkpoint is called.

    Raises:
        CheckpointError: An adapter is of another model, damaged, or cannot be merged.
    """
    warn_of_base(adapters, name)
    merge = _Merge(dict(held), model)
    for adapter in adapters:
        merge.add(adapter)
    return merge.weights


class _Merge:
    """Weights of a checkpoint, and the adapters that were merged into them so far."""

    def __init__(self, weights: dict[str, Weight], model: PreTrainedModel) -> None:
        self.weights = weights
        self._base = dict(weights)
        self._model = model
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._aliases = aliases_of(model)
        targets = model_names(model, weights)
        self._converted = {name for name, converted in targets.values() if converted}
        self._keys = {name: key for key, (name, converted) in targets.items() if not converted}
        self._names = {key: name for name, key in self._keys.items()}
        self._claims: dict[str, tuple[Adapter, bool]] = {}

    def add(self, adapter: Adapter) -> None:
        """Merge one adapter more."""
        changes: dict[str, dict[str, StoredWeight]] = {}
        replaced: dict[str, StoredWeight] = {}
        for name, tensor in _tensors(adapter).items():
            path = name.removeprefix(_PREFIX)
            match = _CHANGE.fullmatch(path)
            if match is not None:
                part = match[2].removesuffix(".weight").replace("embedding_", "")
                changes.setdefault(match[1], {})[part] = tensor
            elif "lora_" in path or "token_adapter" in path:
                raise _refused(tensor, "is of a method that is not merged here")
            elif not self._is_base(path, tensor):
                replaced[_WRAPPERS.sub("", path)] = tensor
        for module, parts in changes.items():
            names = self._aliases.get(f"{module}.weight", ())
            if adapter.settings.get("ensure_weight_tying") and len(names) > 1:
                raise CheckpointError(
                    f"{next(iter(parts.values())).key} in {adapter.path} is of LoRA on "
                    f"{' and '.join(names)}, which are one weight (ensure_weight_tying)",
                    "Train it without these: peft runs such an adapter once, but merges it twice.",
                )
        touched = {self._replace(path, tensor, adapter) for path, tensor in replaced.items()}
        for path, tensor in replaced.items():
            self._check_ties(self._key_of(path, tensor), tensor, touched)
        for module, parts in changes.items():
            first = next(iter(parts.values()))
            if not adapter.targets(module):
                raise _refused(
                    first,
                    f"is of a module that target_modules in {adapter.folder / CONFIG} do not name",
                )
            key = self._change(module, parts, adapter)
            self._check_ties(key, first, set())
            touched.add(key)
        self._check_complete(adapter, touched)

    def _is_base(self, path: str, tensor: StoredWeight) -> bool:
        """Whether a tensor is the base model's own: peft saves those of changed embeddings."""
        if ".base_layer." not in path:
            return False
        base = self._base.get(self._key_of(_WRAPPERS.sub("", path), tensor))
        if base is None or base.shape != tensor.shape:
            return False
        return torch.equal(base.read().to(torch.float32), tensor.read().to(torch.float32))

    def _key_of(self, name: str, tensor: StoredWeight) -> str:
        """The checkpoint's key of a weight that an adapter names as the model or a file does.

        That may be a file of another release of transformers than the checkpoint's.
        """
        key = name if name in self.weights else self._keys.get(name)
        if key is not None:
            return key
        if name not in self._parameters:
            today, converted = model_names(self._model, [name])[name]
            if today in self._parameters and not converted:
                return self._key_of(today, tensor)
        if name in self._parameters:
            if name in self._converted:
                raise _refused(tensor, f"is for {name}, which is made of several stored tensors")
            return name  # the adapter brings it: the head of another task, or one that was tied
        raise _refused(tensor, f"is for {name}, which {type(self._model).__name__} does not have")

    def _claim(self, key: str, tensor: StoredWeight, adapter: Adapter, *, alone: bool) -> None:
        """Let several adapters add to a weight, but none besides one that replaces or scales it."""
        other, taken = self._claims.get(key, (adapter, False))
        if alone and adapter.weight != 1:
            raise _refused(tensor, f"sets {key}, which a weight of {adapter.weight:g} cannot scale")
        if other is not adapter and (alone or taken):
            raise _refused(tensor, f"and the adapter {other.folder} both change {key}")
        self._claims[key] = adapter, alone or taken

    def _replace(self, name: str, tensor: StoredWeight, adapter: Adapter) -> str:
        """Take an adapter's own weight in place of the checkpoint's; return its key."""
        key = self._key_of(name, tensor)
        old = self.weights.get(key)
        shape = old.shape if old is not None else tuple(self._parameters[name].shape)
        if tensor.shape != shape:
            raise _misfit(tensor, key, old, shape)
        self._claim(key, tensor, adapter, alone=True)
        self.weights[key] = tensor
        return key

    def _change(self, path: str, parts: Mapping[str, StoredWeight], adapter: Adapter) -> str:
        """Add B @ A to a module's weight, and what there is to its bias; return its key."""
        first = next(iter(parts.values()))
        absent = {"lora_A", "lora_B"} - set(parts)
        if absent:
            raise _refused(first, f"has no {min(absent)} beside it")
        key = self._key_of(f"{path}.weight", first)
        base = self.weights.get(key)
        if base is None:
            raise _refused(first, f"changes {key}, which the checkpoint does not hold")
        module = self._modules.get(self._names.get(key, key).removesuffix(".weight"))
        embeds = "lora_embedding_A" in first.key or "lora_embedding_B" in first.key
        if isinstance(module, nn.Embedding) != embeds or len(base.shape) != 2:
            raise _refused(first, f"changes a {type(module).__name__}, which is not merged here")
        transposed = embeds or type(module).__name__ == "Conv1D"
        a, b = parts["lora_A"], parts["lora_B"]
        rows, columns = reversed(base.shape) if transposed else base.shape
        rank = adapter.rank(path)
        for tensor, shape in ((a, (rank, columns)), (b, (rows, rank))):
            if tensor.shape != shape:
                raise _misfit(tensor, key, base, shape)
        pieces: list[Weight] = [base, a, b]
        magnitude = parts.get("lora_magnitude_vector")
        if bool(adapter.settings.get("use_dora")) != (magnitude is not None):
            raise _refused(first, f"and use_dora in {adapter.folder / CONFIG} do not agree")
        if magnitude is not None:
            if embeds:
                raise _refused(magnitude, "is of DoRA on an embedding, which is not merged here")
            if magnitude.shape != (rows,):
                raise _misfit(magnitude, key, base, (rows,))
            pieces.append(magnitude)
        self._claim(key, first, adapter, alone=magnitude is not None)
        scale = adapter.scale(path) * adapter.weight
        self.weights[key] = _computed(key, base, pieces, partial(_merged, scale, transposed))
        bias = parts.get("lora_B.bias")
        if bias is not None:
            bias_key = self._key_of(f"{path}.bias", bias)
            old = self.weights.get(bias_key)
            if old is None or bias.shape != old.shape:
                raise _misfit(bias, bias_key, old, (rows,))
            self._claim(bias_key, bias, adapter, alone=False)
            self.weights[bias_key] = _computed(
                bias_key, old, [old, bias], lambda weight, change: weight + change * scale
            )
        return key

    def _check_complete(self, adapter: Adapter, touched: set[str]) -> None:
        """Refuse an adapter that lacks tensors of a module that its config names."""
        for path, module in self._modules.items():
            kinds = (nn.Linear, nn.Embedding)
            if not (isinstance(module, kinds) or type(module).__name__ == "Conv1D"):
                continue
            name = f"{path}.weight"
            saved = adapter.settings.get("modules_to_save") or ()
            if self._keys.get(name, name) in touched or any(
                re.match(rf"(^|.*\.){one}($|\..*)", path) for one in saved
            ):
                continue
            if adapter.settings.get("target_modules") != "all-linear" and adapter.targets(path):
                raise CheckpointError(
                    f"{adapter.path} lacks {_PREFIX}{path}.lora_A.weight, although target_modules "
                    f"in {adapter.folder / CONFIG} name the module",
                    "Download the adapter again, or name the model that it was made for.",
                )

    def _check_ties(self, key: str, tensor: StoredWeight, touched: set[str]) -> None:
        """Refuse to change one of two weights that the model ties."""
        name = self._names.get(key, key)
        others = set(self._aliases.get(name, ())) - {name}
        if any(self._keys.get(other, other) not in touched for other in others):
            raise _refused(tensor, f"changes {name}, which the model ties to {min(others)}")


def _tensors(adapter: Adapter) -> dict[str, StoredWeight]:
    header = header_of(adapter)
    tensors = {key: StoredWeight(adapter.path, key, place) for key, place in header.items()}
    for tensor in tensors.values():
        if "float" not in TORCH_DTYPES[tensor.dtype]:
            raise _refused(tensor, f"is of {TORCH_DTYPES[tensor.dtype]}, not of floating point")
    return tensors


def _computed(key: str, base: Weight, pieces: list[Weight], compute: Any) -> ComputedWeight:
    """A weight that is computed in float32, or float64 where the checkpoint's is."""
    dtype = torch.float64 if base.dtype == "F64" else torch.float32

    def checked(*tensors: torch.Tensor) -> torch.Tensor:
        for piece, tensor in zip(pieces[1:], tensors[1:], strict=True):
            if not bool(torch.isfinite(tensor).all()):
                assert isinstance(piece, StoredWeight)  # noqa: S101 (an adapter's)
                raise _refused(piece, "has elements that are not finite")
        result: torch.Tensor = compute(*(tensor.to(dtype) for tensor in tensors))
        return result

    code = "F64" if dtype == torch.float64 else "F32"
    return ComputedWeight(key, code, base.shape, tuple(pieces), checked)


def _merged(
    scale: float,
    transposed: bool,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    change = b @ a
    merged = weight + (change.T if transposed else change) * scale
    if magnitude is None:
        return merged
    axis = 0 if transposed else 1
    norm: torch.Tensor = torch.linalg.norm(merged, dim=axis, keepdim=True)
    return merged * (magnitude.unsqueeze(axis) / norm)


def _misfit(
    tensor: StoredWeight, key: str, base: Weight | None, shape: tuple[int, ...]
) -> CheckpointError:
    where = f" of {base.path}" if base is not None else ""
    return _refused(
        tensor, f"has shape {list(tensor.shape)}, where {key}{where} needs {list(shape)}"
    )


def _refused(tensor: StoredWeight, why: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.key} in {tensor.path} {why}",
        "Check that the adapter was made for this model; else merge it with peft "
        "(merge_and_unload), and name the folder of the result.",
    )
