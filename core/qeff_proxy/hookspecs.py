"""The five hooks a plugin answers.

A plugin is a module or an object whose functions carry ``@hookimpl``. It need not have all five:
what it leaves out, or answers with ``None`` ("not mine"), the core's generic plugin answers.
Hooks are called with the arguments named here; an implementation may take fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_proxy.parts import Kind, Proxy
    from qeff_proxy.request import Request
    from qeff_proxy.sites import Absent, Site

__all__ = ["HOOK_API_VERSION", "PROJECT_NAME", "hookimpl", "hookspec"]

PROJECT_NAME = "qeff_proxy"
#: Raised when a hook changes in a way that an older plugin can notice.
HOOK_API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec(firstresult=True)
def locate_embedding(model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent | None:
    """Say where the token embedding is.

    Args:
        model: The uncut model; possibly on the meta device, so don't look at values.
        config: Its config.

    Returns:
        The site, `Absent` with the reason there is none, or ``None`` for "not mine". The first
        answer that is not ``None`` counts.
    """


@hookspec(firstresult=True)
def locate_lm_head(model: PreTrainedModel, config: PreTrainedConfig) -> Site | Absent | None:
    """Say where the LM head is. Arguments and answers are those of `locate_embedding`."""


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
        embedding: What `locate_embedding` said.
        lm_head: What `locate_lm_head` said.
        kind: ``"split"``, ``"stub"`` or ``"whole"``.
        options: What the user asked of the parts besides, by names that the family knows
            (``pooling`` …); often empty. A proxy's own ``settings``, given here, must lead to the
            same proxy again.

    Returns:
        The parts to export, each with its inputs, outputs and dynamic axes, or ``None`` for "not
        mine". The core then verifies that the parts together equal the uncut model.
    """


@hookspec(firstresult=True)
def preprocess(processor: Any, request: Request) -> Mapping[str, torch.Tensor] | None:
    """Turn what the user gave into named input tensors.

    Args:
        processor: The checkpoint's tokenizer or processor, or ``None`` where it has none.
        request: Prompts, audio, images, or ready-made tensors.

    Returns:
        The tensors by their names in the graphs (``input_ids`` and ``attention_mask``, both
        ``[batch, sequence]`` int64), or ``None`` for "not mine".
    """


@hookspec(firstresult=True)
def decode(processor: Any, outputs: Mapping[str, Any]) -> Any | None:
    """Turn outputs into what the user wanted: texts, a transcript, vectors.

    Args:
        processor: As in `preprocess`.
        outputs: What the flow gave; for ``"causal-lm"`` the key ``generated_ids`` holds the new
            token ids, one int64 array per prompt.

    Returns:
        One result per input (for text a list of strings), or ``None`` for "not mine".
    """
