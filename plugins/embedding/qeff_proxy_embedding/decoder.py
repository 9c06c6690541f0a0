"""Decoder-based embedding models: Qwen3-Embedding, e5-mistral, EmbeddingGemma.

They are base models of causal LMs, run once without a cache, usually with last-token pooling. Their
model types are those of causal LMs, so the entry points register them for this task only.
"""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embed_tokens")
