"""Imported once by the process that cells are forked from: what every cell imports.

It computes nothing, since threads do not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress

_MODULES = (
    "onnxruntime",
    "torch.onnx",
    "transformers.generation",
    "transformers.processing_utils",
    "transformers.tokenization_utils_tokenizers",
    "qeff_proxy.backends.onnxruntime.backend",
    "qeff_proxy.backends.torch.backend",
    "qeff_proxy.compare.report",
    "qeff_proxy.cut.cut_model",
    "qeff_proxy.export.export_model",
    "qeff_proxy.export.model_graphs",
    "qeff_proxy.export.trace.trace_part",
    "qeff_proxy.families.decoder",
    "qeff_proxy.flows.causal_engine",
    "qeff_proxy.session.torch_session",
    "qeff_proxy.sweep.fingerprint",
    "qeff_proxy.sweep.run_cell",
    "qeff_proxy.verify.verify_model",
)

for _module in _MODULES:
    with suppress(ImportError):  # the cell that needs it says so
        importlib.import_module(_module)
gc.collect()
gc.freeze()  # a collection in a cell would touch, and so copy, every page
