"""QEfficient's ``load_hf_tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.errors import CheckpointError


def load_hf_tokenizer(
    pretrained_model_name_or_path: str | Path,
    cache_dir: str | Path | None = None,
    hf_token: str | None = None,
    padding_side: str = "right",
    **settings: Any,
) -> Any:
    """A checkpoint's tokenizer; without a pad token, its end-of-sequence token pads.

    Args:
        pretrained_model_name_or_path: A local folder or a hub id.
        cache_dir: Where what is fetched from the hub is kept.
        hf_token: The token for the hub.
        padding_side: ``"right"`` or ``"left"``; ``generate`` pads prompts by itself.
        settings: Further arguments of ``AutoTokenizer.from_pretrained``. Unlike QEfficient's, this
            function runs the checkpoint's own code only with ``trust_remote_code=True``.

    Raises:
        CheckpointError: There is none that can be loaded.
    """
    from transformers import AutoTokenizer

    hub = {"cache_dir": cache_dir, "token": hf_token}
    settings.update({name: value for name, value in hub.items() if value is not None})
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, padding_side=padding_side, **settings
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(pretrained_model_name_or_path)!r} gives no tokenizer ({first_line(error)})",
            "Check the name and the network, or name a folder with tokenizer files.",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
