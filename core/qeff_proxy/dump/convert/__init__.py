"""Dumps in the formats that other tools read and write.

- `onnx_data`: ``test_data_set_N/{input,output}_K.pb``, of ONNX's backend tests.
- `polygraphy`: JSON of saved inputs and outputs, of NVIDIA's Polygraphy.

These formats know one graph, so a conversion is of one part. Reading them gives a dump that can be
compared with any other.

A package registers a format as an entry point of the group ``qeff_proxy.dump_formats``: its name →
a module with ``export_dump(source, folder)`` and ``import_dump(path, folder, *, like, part)``,
which may take ``model``, ``runner`` and ``dtypes`` besides: the options of ``qeff-proxy convert``.
"""

from __future__ import annotations

from qeff_proxy.dump.convert.common import ConversionSource, choose_part

#: The formats of the core: name → module.
BUILTIN_FORMATS = {
    "onnx": "qeff_proxy.dump.convert.onnx_data",
    "polygraphy": "qeff_proxy.dump.convert.polygraphy",
}

__all__ = ["BUILTIN_FORMATS", "ConversionSource", "choose_part"]
