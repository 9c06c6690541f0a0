"""RoBERTa, XLM-RoBERTa, CamemBERT: positions count from the padding token's id plus one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_proxy_embedding.family import EmbeddingFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["family"]


def _longest(config: PreTrainedConfig) -> int:
    return int(config.max_position_embeddings - config.pad_token_id - 1)


family = EmbeddingFamily("embeddings.word_embeddings", _longest)
