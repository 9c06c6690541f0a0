"""NomicBERT: rotary positions and token types."""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embeddings.word_embeddings")
