"""BERT (BGE, E5, GTE, MiniLM): position and token type embeddings stay in the body."""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embeddings.word_embeddings")
