"""ModernBERT: rotary positions, and layers with a sliding window."""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embeddings.tok_embeddings")
