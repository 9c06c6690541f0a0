"""MPNet: positions count from 2, and a relative bias is added to the attention scores."""

from __future__ import annotations

from transformers import PreTrainedConfig

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

# The model's code fixes the padding token's id at 1 and ignores the config's.
_FIRST_POSITION = 2


def _longest(config: PreTrainedConfig) -> int:
    return int(config.max_position_embeddings - _FIRST_POSITION)


family = EmbeddingFamily("embeddings.word_embeddings", _longest)
