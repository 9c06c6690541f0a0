"""QEfficient's ``base``: says what there is instead."""

raise ImportError(
    "there is no qeff_proxy.base: a model is exported as transformers has it, and there are no "
    "transforms to choose. Leave the import out."
)
