"""RoBERTa, XLM-RoBERTa, CamemBERT: positions count from the padding token's id plus one."""

from __future__ import annotations

from transformers import PreTrainedConfig

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]


def _longest(config: PreTrainedConfig) -> int:
    return int(config.max_position_embeddings - config.pad_token_id - 1)


family = EmbeddingFamily("embeddings.word_embeddings", _longest)
