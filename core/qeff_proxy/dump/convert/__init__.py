"""Dumps in the formats that other tools read and write.

- `qaic`: ``aic_batch_io.json`` and ``.raw`` files, of the Qualcomm Cloud AI tools.
- `onnx_data`: ``test_data_set_N/{input,output}_K.pb``, of ONNX's backend tests.
- `polygraphy`: JSON of saved inputs and outputs, of NVIDIA's Polygraphy.

These formats know one graph, so a conversion is of one part. Reading them gives a dump that can be
compared with any other.
"""

from __future__ import annotations

from qeff_proxy.dump.convert.common import ConversionSource, choose_part
from qeff_proxy.dump.convert.onnx_data import export_onnx, import_onnx
from qeff_proxy.dump.convert.polygraphy import export_polygraphy, import_polygraphy
from qeff_proxy.dump.convert.qaic import export_qaic, import_qaic

__all__ = [
    "ConversionSource",
    "choose_part",
    "export_onnx",
    "export_polygraphy",
    "export_qaic",
    "import_onnx",
    "import_polygraphy",
    "import_qaic",
]
