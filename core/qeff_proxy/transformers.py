"""QEfficient's ``transformers``: says what there is instead."""

raise ImportError(
    "there is no qeff_proxy.transformers: models are exported as transformers has them, not "
    "rewritten. For a reranker or an embedder of text, see QEFFAutoModelForSequenceClassification "
    "and QEFFAutoModel."
)
