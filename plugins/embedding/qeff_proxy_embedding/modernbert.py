"""ModernBERT: rotary positions, and layers that see a window only."""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embeddings.tok_embeddings")
