"""Tell a backend that runs nothing from one that refuses an operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qeff_proxy.artifact.manifest_schema import ExportedPart
from qeff_proxy.errors import BackendError
from qeff_proxy.graph.split_layers import LayerGraph
from qeff_proxy.parts import TensorSpec
from qeff_proxy.verify.by_layer.candidate import Candidate
from qeff_proxy.verify.results import reason_of

_ADDITION = """
<ir_version: 8, opset_import: ["" : 18]>
addition (float[1, 4] one, float[1, 4] two) => (float[1, 4] sum) { sum = Add(one, two) }
"""


def check_runs_anything(candidate: Candidate, part: ExportedPart, reason: str) -> None:
    """Run one addition on a backend that has refused a layer.

    Args:
        candidate: The backend.
        part: What the layer is in.
        reason: Why it refused the layer.

    Raises:
        BackendError: It refuses the addition for the same reason.
    """
    model = ir.serde.deserialize_model(onnx.parser.parse_model(_ADDITION))
    one, two, total = (TensorSpec(name, "float32", (1, 4)) for name in ("one", "two", "sum"))
    ones = np.ones((1, 4), np.float32)
    try:
        with candidate.session(part, LayerGraph(None, model, (one, two), (total,))) as session:
            session.run({"one": ones, "two": ones})
    except Exception as error:
        if reason_of(error) == reason:
            raise BackendError(
                f"{candidate.name} refuses whatever it is given, even one addition: {reason}",
                f"Correct its options (-O), or see qeff-proxy backends --check {candidate.name}.",
            ) from error
