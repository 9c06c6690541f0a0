"""The files that ``qaic-compile`` reads, in the form in which QEfficient writes them.

Read in quic/efficient-transformers (``base/modeling_qeff.py``, ``compile/mdp_generator.py`` and
``utils/_utils.py`` of QEfficient): ``specializations.json``, ``custom_io.yaml`` and how a model is
laid over several devices. Here the cache goes in and comes out, so it has names and lengths of its
own: ``past_len`` positions go in and ``ctx_len`` come out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir
    from qeff_proxy.artifact.manifest_schema import Export, ExportedPart
    from qeff_proxy.session.axes import Sizes

__all__ = [
    "fp32_nodes",
    "graph_beside_weights",
    "write_custom_io",
    "write_partition",
    "write_specializations",
]

#: Our axes → the symbols that QEfficient's graphs have.
_SYMBOLS = {
    "batch": "batch_size",
    "query": "seq_len",
    "sequence": "seq_len",
    "past": "past_len",
    "past + query": "ctx_len",
}


def write_specializations(
    part: ExportedPart, found: Sequence[Sizes], path: Path, *, named: bool = True
) -> None:
    """Write ``specializations.json``: a name, and the size of each symbol as a string.

    Args:
        part: The part.
        found: Its specializations (`qeff_proxy_npu.fixed_shapes.Plan`).
        path: The file.
        named: False writes the sizes alone, as QEfficient did up to 1.21: older compilers refuse
            values that are objects.
    """
    specializations = [_specialization(part, sizes, found) for sizes in found]
    value = {"specializations": [one if named else one["symbols"] for one in specializations]}
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")


def _specialization(
    part: ExportedPart, sizes: Mapping[str, int], found: Sequence[Sizes]
) -> dict[str, Any]:
    symbols = {_symbol(axis): str(size) for axis, size in sizes.items()}
    if "query" in sizes:
        name = "Decode" if sizes["query"] == 1 and len(found) > 1 else "Prefill"
        if "past" in sizes:
            symbols["ctx_len"] = str(sizes["past"] + sizes["query"])
        alike = [one for one in found if (one["query"] == 1) == (sizes["query"] == 1)]
    else:
        name = part.name.capitalize()
        alike = list(found)
    if len(alike) > 1:
        name += f"_{alike.index(dict(sizes))}"
    return {"name": name, "symbols": symbols}


def write_custom_io(part: ExportedPart, precision: str, path: Path) -> bool:
    """Write ``custom_io.yaml``: the dtype of each tensor of the cache at the graph's edge.

    Args:
        part: The part.
        precision: ``"float16"``, ``"bfloat16"`` or ``"mxint8"``.
        path: The file.

    Returns:
        Whether the part has a cache; else nothing is written.
    """
    names = [
        spec.name
        for spec in (*part.inputs, *part.outputs)
        if spec.name.startswith(("past_key_values.", "present."))
    ]
    entries = [f" - IOName: {name}\n   Precision: {precision}\n\n" for name in names]
    if entries:
        path.write_text("".join(entries), encoding="utf-8")
    return bool(entries)


def fp32_nodes(nodes: Iterable[ir.Node]) -> str:
    """The content of a node-precision file: the outputs of nodes that stay in float32.

    Read in quic/efficient-transformers, which writes names of outputs, not of nodes.
    """
    names = [str(value.name) for node in nodes for value in node.outputs if value.name]
    return "FP32NodeInstanceNames:\n" + "".join(f"  - {json.dumps(name)}\n" for name in names)


def write_partition(devices: int, cores: int, path: Path) -> None:
    """Write how a model is laid over several devices: one partition, sliced by the compiler."""
    value = {
        "connections": [{"devices": list(range(devices)), "type": "p2p"}],
        "partitions": [
            {
                "name": "Partition0",
                "devices": [{"deviceId": index, "numCores": cores} for index in range(devices)],
            }
        ],
    }
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")


def graph_beside_weights(export: Export, part: ExportedPart, folder: Path) -> Path:
    """Put the part's graph, with QEfficient's names of the dynamic axes, beside its weights.

    Args:
        export: The export; it is not changed.
        part: Which part.
        folder: Where to. The weights are copied: readers of ONNX refuse links.

    Returns:
        The graph's path.

    Raises:
        BackendError: The graph cannot be read.
    """
    source = export.folder / part.file
    try:
        model = onnx.load(str(source), load_external_data=False)
    except Exception as error:  # protobuf's errors share no public base class
        raise BackendError(f"the graph of the {part.name} part cannot be read: {error}") from error
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = _symbol(axis.dim_param)
    path = folder / part.file
    path.write_bytes(model.SerializeToString())
    if part.weights is not None:
        shutil.copyfile(export.folder / part.weights, folder / part.weights)
    return path


def _symbol(axis: str) -> str:
    """The symbol of an axis: a plain name."""
    return _SYMBOLS.get(axis) or "".join(
        letter if letter.isalnum() else "_" for letter in axis.replace(" ", "")
    )
