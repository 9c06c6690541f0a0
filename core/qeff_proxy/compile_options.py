"""The options of ``compile`` that all backends share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qeff_proxy.common.arguments import whole_number
from qeff_proxy.errors import UsageError


@dataclass(frozen=True)
class CompileOptions:
    """The options of ``compile`` that all backends share.

    Attributes:
        batch_size: Rows of the batch, for backends of static shapes.
        prefill_seq_len: Tokens of a prefill chunk; longer prompts are run in chunks of this size.
            ``None``: the whole prompt at once.
        ctx_len: Most positions, prompt and generated tokens together. ``None``: as many as the
            model has.
        seq_len: Lengths that inputs of a single pass are padded to, each to the nearest that is
            long enough. ``None``: to the longest of the batch.
        num_cores: Cores to use: threads on a CPU. ``None``: the backend's own choice.
        backend: Options that only one backend has, by name.
    """

    batch_size: int = 1
    prefill_seq_len: int | None = None
    ctx_len: int | None = None
    seq_len: tuple[int, ...] | None = None
    num_cores: int | None = None
    backend: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_seq_len", "ctx_len", "num_cores"):
            value = getattr(self, name)
            if value is not None or name == "batch_size":
                whole_number(name, value)
        for length in self.seq_len if self.seq_len is not None else ():
            whole_number("a length of seq_len", length)
        if self.seq_len == ():
            raise UsageError("seq_len is empty", "Name a length or several, or leave it out.")
        if self.ctx_len and self.prefill_seq_len and self.prefill_seq_len > self.ctx_len:
            raise UsageError(
                f"prefill_seq_len ({self.prefill_seq_len}) is larger than ctx_len ({self.ctx_len})",
                "A prefill chunk must fit into the context.",
            )

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object."""
        lengths = list(self.seq_len) if self.seq_len is not None else None
        return {**vars(self), "seq_len": lengths, "backend": dict(self.backend)}
