"""Compile one graph of fixed shapes for HTP, and report which nodes stayed on the CPU."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from qeff_proxy.common.messages import counted
from qeff_proxy.errors import ArtifactError, BackendError
from qeff_proxy.graph.name_scopes import layer_of

from qeff_proxy_npu.fixed_shapes.compiler_fixes import constants_of
from qeff_proxy_npu.qnn.diagnosis import LeftNode, first_failing_node, nodes_left, reasons_in
from qeff_proxy_npu.qnn.options import QnnOptions
from qeff_proxy_npu.qnn.process import CrashError, RefusalError, Worker

__all__ = ["CompileReport", "compile_graph"]

_SHOWN = 5


@dataclass(frozen=True)
class CompileReport:
    """Where the nodes of a graph went.

    Attributes:
        on_htp: How many nodes are on HTP.
        left: Those that stayed on the CPU.
        bytes: Size of the context binaries.
    """

    on_htp: int
    left: tuple[LeftNode, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        left = [node.to_json() for node in self.left]
        return {"on_htp": self.on_htp, "on_cpu": left, "bytes": self.bytes}


def compile_graph(
    model: ir.Model, weights: Path, target: Path, options: QnnOptions, log: Path, part: str
) -> CompileReport:
    """Compile a graph.

    Args:
        model: Of fixed shapes; its weights are external.
        weights: The folder that the weights' files are in.
        target: The ONNX file to write, which wraps the context binaries beside it.
        options: For which chip, and how strictly.
        log: Where the compiler's log is appended.
        part: The part's name, for messages.

    Raises:
        BackendError: The compiler refuses a node and ``strict`` is set, or it fails or crashes;
            names operator, node and layer where they can be found.
        ArtifactError: There is no space for the binary.
    """
    try:
        _run(model, weights, target, options, log)
    except (RefusalError, CrashError) as error:
        _explain(error, model, weights, options, log, part)
    if target.is_file():
        _make_independent(target, weights)
    computed = _computed(model.graph)
    left = tuple(
        nodes_left(ir.load(target), model.graph, {})
        if target.is_file()
        else [LeftNode(node.op_type, str(node.name), layer_of(node), "") for node in computed]
    )
    if left:
        reasons = reasons_in(_verbose_log(model, weights, options))
        left = tuple(
            LeftNode(node.operator, node.name, node.layer, reasons.get(node.name, node.reason))
            for node in left
        )
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"stays on the CPU: {node}\n" for node in left)
        if options.strict or not target.is_file():
            raise _refused(left, len(computed), options, log, part)
    binaries = sum(path.stat().st_size for path in target.parent.glob("*.bin"))
    return CompileReport(len(computed) - len(left), left, binaries)


def _run(
    model: ir.Model,
    weights: Path,
    target: Path,
    options: QnnOptions,
    log: Path,
    *,
    verbose: bool = False,
) -> None:
    """Compile in a process of its own, which ends with it."""
    graph = np.frombuffer(ir.to_proto(model).SerializeToString(), np.uint8)
    worker = Worker(log, options.timeout, options.memory_mb)
    try:
        worker.ask(
            "compile",
            {"graph": graph},
            provider=options.provider(),
            settings={
                "ep.context_enable": "1",
                "ep.context_file_path": str(target),
                "ep.context_embed_mode": "0",
                "session.model_external_initializers_file_folder_path": str(weights),
            },
            verbose=verbose,
        )
    finally:
        worker.close()


def _make_independent(target: Path, weights: Path) -> None:
    """Take references to the export's weights out of the compiled model.

    The runtime leaves some to weights that are in the context binary, and to those that nodes on
    the CPU need.
    """
    model = ir.load(target)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
        elif isinstance(value.const_value, ir.ExternalTensor):
            one = value.const_value
            place = ir.ExternalTensor(
                one.location, one.offset, one.length, one.dtype,
                shape=one.shape, name=name, base_dir=weights,
            )  # fmt: skip
            value.const_value = ir.Tensor(place.numpy().copy(), name=name)
    ir.save(model, target)


def _computed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that depend on an input: all others are folded away."""
    constants = constants_of(graph)
    return [node for node in graph if any(value not in constants for value in node.outputs)]


def _verbose_log(model: ir.Model, weights: Path, options: QnnOptions) -> str:
    """The compiler's notes on each node: long, so only read if something is wrong."""
    with tempfile.TemporaryDirectory(prefix="qeff-proxy-") as folder:
        log = Path(folder) / "verbose.log"
        # If it fails, the log up to there is enough.
        with contextlib.suppress(RefusalError, CrashError):
            _run(model, weights, Path(folder) / "graph.onnx", options, log, verbose=True)
        return log.read_text(encoding="utf-8", errors="replace")


def _refused(
    left: tuple[LeftNode, ...], count: int, options: QnnOptions, log: Path, part: str
) -> BackendError:
    shown = "; ".join(str(node) for node in left[:_SHOWN])
    more = f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return BackendError(
        f"{len(left)} of {counted(count, 'node')} of the {part} part "
        f"{'does' if len(left) == 1 else 'do'} not go to HTP ({options.soc}, "
        f"v{options.htp_arch}): {shown}{more}",
        f"With strict=false they stay on the CPU. The log: {log}",
    )


def _explain(
    error: RefusalError | CrashError,
    model: ir.Model,
    weights: Path,
    options: QnnOptions,
    log: Path,
    part: str,
) -> None:
    """Raise an error for a failure, with the node at which it begins if that can be found."""
    if "No space left" in error.problem:
        raise ArtifactError(
            f"the context binary of the {part} part cannot be written: no space left on device",
            "Free space there, or set QEFF_HOME (or --output) to another disk.",
        ) from error
    where = ""
    if options.memory_mb is None:
        node = first_failing_node(model, lambda graph: _fails(graph, weights, options))
        if node is not None:
            where = f" at {LeftNode(node.op_type, str(node.name), layer_of(node), '')}"
    raise BackendError(
        f"the Qualcomm compiler fails on the {part} part{where}: {error.problem}",
        f"The log: {log}",
    ) from error


def _fails(model: ir.Model, weights: Path, options: QnnOptions) -> bool:
    with tempfile.TemporaryDirectory(prefix="qeff-proxy-") as folder:
        try:
            _run(model, weights, Path(folder) / "graph.onnx", options, Path(folder) / "log")
        except (RefusalError, CrashError):
            return True
    return False
