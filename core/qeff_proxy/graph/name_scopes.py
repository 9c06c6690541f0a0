"""The layer that a node of a graph was traced from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

#: Node metadata that exports keep: the module paths a node was traced from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"

_LAYER = re.compile(r"\.(\d+)(?![\w])")


def layer_of(node: ir.Node) -> int | None:
    """The layer, counted from 0, that a node's module path names; ``None`` outside of layers."""
    number = _LAYER.search(node.metadata_props.get(NAME_SCOPES, ""))
    return int(number[1]) if number else None
