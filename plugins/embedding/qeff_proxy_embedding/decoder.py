"""Embedding models made of a decoder: Qwen3-Embedding, e5-mistral, EmbeddingGemma's like.

They are the base model of a causal LM, run once without a cache; pooling takes the last token as
a rule. Their model types are those of causal LMs, which is why they are claimed for this task only.
"""

from __future__ import annotations

from qeff_proxy_embedding.family import EmbeddingFamily

__all__ = ["family"]

family = EmbeddingFamily("embed_tokens")
