"""See whether a plugin changed the model that it cut.

A plugin that changes weights would change both the parts and the model they are compared with, and
the verification would compare two wrongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qeff_proxy.load.mapped_memory import few_pages

#: Of larger tensors, so many runs of so many elements are compared, at equal distances: single
#: elements would lie in as many pages of a file.
_RUNS, _RUN = 256, 256


def snapshot_model(model: nn.Module) -> dict[str, Any]:
    """The state of a model, by name, in which any change to it shows.

    Modules and tensors by identity, tensors also by their number of in-place changes and by a sum
    over their bits (of 65,536 elements at most, none on the meta device); and the config's values.
    """
    state: dict[str, Any] = {
        f"module {path or '(the model)'}": (id(module), module.training)
        for path, module in model.named_modules()
    }
    # Buffers that are not saved, such as rotary tables, a model may compute anew as it runs.
    kept = model.state_dict()
    saved = {name: one for name, one in model.named_buffers() if name in kept}
    with few_pages(model) as give_back:
        for name, tensor in {**saved, **dict(model.named_parameters())}.items():
            state[f"tensor {name}"] = (id(tensor), tensor._version, _sum_of_bits(tensor))  # noqa: SLF001
            give_back(tensor)
    config = getattr(model, "config", None)
    if config is not None:
        state["the config"] = config.to_dict()
    return state


def changes_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two snapshots of one model differ."""
    names = [name for name in before if name not in after or before[name] != after[name]]
    return names + [name for name in after if name not in before]


def _sum_of_bits(tensor: torch.Tensor) -> int | None:
    if tensor.is_meta or not tensor.numel():
        return None
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    if flat.numel() > _RUNS * _RUN:
        step = flat.numel() // _RUNS
        flat = flat[: _RUNS * step].view(_RUNS, step)[:, :_RUN]
    sample = flat.contiguous().view(torch.uint8).flatten()
    weights = torch.arange(1, 8, dtype=torch.int64).repeat(-(-len(sample) // 7))[: len(sample)]
    return int((sample.to(torch.int64) * weights).sum())
