"""Load the tokenizer or processor of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qeff_proxy.common.messages import first_line
from qeff_proxy.common.quiet import quiet_loading
from qeff_proxy.errors import CheckpointError
from qeff_proxy.load.checkpoint_files import (
    read_config_file,
)
from qeff_proxy.load.transformers_model import (
    remote_code_adapter,
)

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "*.tiktoken", "*.jsonl", "merges.txt")


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


_ALL_FILES = (*_TOKENIZER_FILES, *_PROCESSOR_FILES)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's processor or tokenizer.

    Raises:
        CheckpointError: It has none that can be loaded.
    """
    import transformers

    if trust_remote_code:
        adapter = remote_code_adapter(str(read_config_file(folder).get("model_type")))
        own = adapter.load_processor(folder) if hasattr(adapter, "load_processor") else None
        if own is not None:
            return own
    # Without any of its files, transformers makes an empty tokenizer for some model types.
    kinds = ["AutoTokenizer"] if _any_file(folder, _TOKENIZER_FILES) else []
    if _any_file(folder, _PROCESSOR_FILES):
        kinds.insert(0, "AutoProcessor")
    reasons = [] if kinds else ["it has none of the files of one"]
    files = sorted({path.name for pattern in _ALL_FILES for path in folder.glob(pattern)})
    for kind in kinds:
        try:
            with quiet_loading():
                return getattr(transformers, kind).from_pretrained(
                    folder, trust_remote_code=trust_remote_code, local_files_only=True
                )
        except Exception as error:  # noqa: BLE001 (damaged files raise what they like)
            reasons.append(first_line(error))
    named = f", from {', '.join(files)}" if files else ""
    raise CheckpointError(
        f"{folder} has no tokenizer that can be loaded ({reasons[-1]}){named}",
        "Add its tokenizer files (tokenizer.json, tokenizer_config.json), or give token ids: "
        'inputs={"input_ids": …}.',
    )


def _any_file(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
