"""QEfficient's ``cloud``: its program ``infer``, and what there is instead of the others."""
