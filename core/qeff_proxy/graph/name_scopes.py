"""Which layer a node of a graph belongs to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["NAME_SCOPES", "layer_of"]

#: Node metadata that is kept: the module paths a node comes from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"

_LAYER = re.compile(r"\.(\d+)(?![\w])")


def layer_of(node: ir.Node) -> int | None:
    """The layer a node comes from, counted from 0, as its module path says; ``None`` for none."""
    found = _LAYER.search(node.metadata_props.get(NAME_SCOPES, ""))
    return int(found[1]) if found else None
