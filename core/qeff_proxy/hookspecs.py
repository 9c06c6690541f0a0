"""The five hooks of a plugin.

A plugin is a module or an object whose functions carry ``@hookimpl``. It need not have all five:
the core's generic plugin answers the hooks that it lacks or answers with ``None`` ("not mine").
Hooks are called with the arguments named here; an implementation may take fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from qeff_proxy.request import Request
from qeff_proxy.sites import Absent, Site

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.parts import Kind, Proxy

__all__ = ["HOOK_API_VERSION", "PROJECT_NAME", "hookimpl", "hookspec"]

PROJECT_NAME = "qeff_proxy"
#: Increased when a hook changes in a way that breaks older plugins.
HOOK_API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec(firstresult=True)
def locate_embedding(model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent | None:
    """Locate the token embedding.

    Args:
        model: The uncut model; possibly on the meta device, so that its weights have no values.
        config: Its config.

    Returns:
        The site, `Absent` with the reason there is none, or ``None`` for "not mine". The first
        answer that is not ``None`` counts.
    """


@hookspec(firstresult=True)
def locate_lm_head(model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent | None:
    """Locate the LM head. Arguments and results are those of `locate_embedding`."""


@hookspec(firstresult=True)
def build_proxy(
    model: PreTrainedModel,
    embedding: Site | Absent,
    lm_head: Site | Absent,
    kind: Kind,
    options: Mapping[str, Any],
) -> Proxy | None:
    """Cut the model.

    Args:
        model: The uncut model, in evaluation mode. It must not be changed: a part is a new module
            that holds the model's own submodules (see `qeff_proxy.layers.replace_modules`).
        embedding: The result of `locate_embedding`.
        lm_head: The result of `locate_lm_head`.
        kind: ``"split"``, ``"stub"`` or ``"whole"``.
        options: The user's options for the parts, by names that the family defines (``pooling``
            …); often empty. Passing a proxy's ``settings`` as options must build the same proxy.

    Returns:
        The parts to export, each with its inputs, outputs and dynamic axes, or ``None`` for "not
        mine". The core then verifies that the parts together equal the uncut model.
    """


@hookspec(firstresult=True)
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Turn the user's request into named input tensors.

    Args:
        processor: The checkpoint's tokenizer or processor, or ``None`` where it has none.
        request: Prompts, audio, images, or ready-made tensors.

    Returns:
        The tensors by their names in the graphs (``input_ids`` and ``attention_mask``, both
        ``[batch, sequence]`` int64), or ``None`` for "not mine".
    """


@hookspec(firstresult=True)
def decode(processor: Any, outputs: Mapping[str, Any]) -> Any | None:
    """Turn outputs into results for the user: texts, a transcript, vectors.

    Args:
        processor: As in `preprocess`.
        outputs: The outputs of the flow; for ``"causal-lm"`` the key ``generated_ids`` holds
            the new token ids, one int64 array per prompt.

    Returns:
        One result per input (for text a list of strings), or ``None`` for "not mine".
    """
