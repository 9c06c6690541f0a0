"""Which layer a node of a graph belongs to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qeff_proxy.graph_edges import NAME_SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["layer_of"]

_LAYER = re.compile(r"\.(\d+)(?![\w])")


def layer_of(node: ir.Node) -> int | None:
    """The layer a node comes from, counted from 0, as its module path says; ``None`` for none."""
    found = _LAYER.search(node.metadata_props.get(NAME_SCOPES, ""))
    return int(found[1]) if found else None
