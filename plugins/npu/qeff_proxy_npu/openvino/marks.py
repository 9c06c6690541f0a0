"""OpenVINO's marks of operators that stay in float32 on a device that computes in a narrower dtype.

A mark is the runtime attribute ``DisablePrecisionConversion`` of an operation, called ``precise``
by versions before it. Python cannot set such attributes, so they are written into the model's XML
(OpenVINO IR), which is what is then compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from qeff_proxy.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["mark", "operations_of"]

#: The attributes, the older one first: a version that knows both keeps the last.
_ATTRIBUTES: tuple[dict[str, str], ...] = (
    {"name": "precise", "version": "0"},
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:bf16,f16"},
)


def operations_of(model: Any, nodes: Sequence[ir.Node]) -> list[Any]:
    """The operations that OpenVINO's ONNX reader made of some nodes, their weights included.

    Args:
        model: What it read.
        nodes: Of the ONNX graph, with the names of its values.

    Raises:
        BackendError: A value of the graph is not in the model, so that nothing can be told of it.
    """
    makers: dict[str, Any] = {
        name: operation
        for operation in model.get_ops()
        for output in operation.outputs()
        for name in output.get_names()
    }
    found: dict[str, Any] = {}
    for node in nodes:
        names = [str(value.name) for value in node.outputs if value.name]
        missing = [name for name in names if name not in makers]
        if missing:
            raise BackendError(
                f"OpenVINO has no value {missing[0]} of {node.op_type} node {node.name}, which the "
                "recipe keeps wide",
                "Leave its module out of the recipe.",
            )
        waiting = [makers[name] for name in names]
        while waiting:  # up to the values that other nodes made
            operation = waiting.pop()
            if operation.get_friendly_name() in found:
                continue
            found[operation.get_friendly_name()] = operation
            for value in operation.input_values():
                maker = value.get_node()
                if maker.get_type_name() == "Constant" or not value.get_names():
                    waiting.append(maker)
    return [one for one in found.values() if one.get_type_name() != "Parameter"]


def mark(openvino: Any, model: Any, nodes: Sequence[ir.Node], path: Path) -> None:
    """Write a model with the operations of some nodes marked, and its weights beside it.

    Args:
        openvino: The package.
        model: As OpenVINO read it from ONNX.
        nodes: Of the ONNX graph: those that stay wide.
        path: The XML file.

    Raises:
        BackendError: See `operations_of`.
    """
    wide = {operation.get_friendly_name() for operation in operations_of(model, nodes)}
    openvino.serialize(model, str(path), str(path.with_suffix(".bin")))
    tree = ElementTree.parse(path)  # noqa: S314 (OpenVINO wrote it just now)
    layers: Mapping[str | None, ElementTree.Element] = {
        layer.get("name"): layer for layer in tree.iterfind("layers/layer")
    }
    for name in sorted(wide):
        info = layers[name].find("rt_info")
        if info is None:
            info = ElementTree.SubElement(layers[name], "rt_info")
        for attribute in _ATTRIBUTES:
            ElementTree.SubElement(info, "attribute", attribute)
    tree.write(path, encoding="utf-8", xml_declaration=True)
