"""QEfficient's ``customop``: says what there is instead."""

raise ImportError(
    "there is no qeff_proxy.customop: graphs have operators of ONNX alone. Leave the import out, "
    "or add an operator where the backend compiles (docs/plugin.md)."
)
