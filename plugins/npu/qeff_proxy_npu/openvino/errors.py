"""Which operator of which node OpenVINO refuses, read from its messages and the graph."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx
from qeff_proxy.errors import BackendError
from qeff_proxy.graph.name_scopes import NAME_SCOPES

__all__ = ["refusal_of"]

_UNKNOWN = re.compile(r"No conversion rule found for operations?: ([^\n]+)")
_FAILED = re.compile(r"ONNX node '<Node\((\w+)\): ([^>]*)>'")
_OPERATOR = re.compile(r"(?:(?P<domain>[\w.]+)\.)?(?P<name>\w+?)(?:-\d+)?\Z")


def refusal_of(error: Exception, path: Path, part: str, device: str) -> BackendError:
    """What to raise when OpenVINO refuses a part.

    Args:
        error: What it raised.
        path: The part's ONNX file.
        part: The part's name.
        device: What it was compiled for.
    """
    text = str(error)
    prefix = f"OpenVINO refuses the {part} part for {device}"
    unknown = _UNKNOWN.search(text)
    if unknown is not None:
        operators = [word.strip() for word in unknown[1].split(",") if word.strip()]
        where = _describe_node(path, operators[0])
        return BackendError(f"{prefix}: it does not know the operator {operators[0]}{where}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if not re.match(r"(Exception from|Check '|Summary|--)", line)]
    reason = reasons[-1] if reasons else lines[-1] if lines else type(error).__name__
    failed = _FAILED.search(text)
    if failed is not None:
        operator, output = failed[1], failed[2].split(",")[0].strip()
        where = _describe_node(path, operator, output)
        return BackendError(f"{prefix}: the operator {operator}{where} fails: {reason}")
    return BackendError(f"{prefix}: {reason}")


def _describe_node(path: Path, operator: str, output: str | None = None) -> str:
    """`` (node NAME in MODULE)`` of the first node of that operator; empty if there is none."""
    match = _OPERATOR.match(operator)
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # noqa: BLE001 (the file may be what is wrong; protobuf's errors are its own)
        return ""
    for node in graph.node:
        if match is None or node.op_type != match["name"]:
            continue
        if output is None or output in node.output:
            scopes = [entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES]
            module = _innermost(scopes[0]) if scopes else ""
            return f" (node {node.name or node.output[0]}{f' in {module}' if module else ''})"
    return ""


def _innermost(scopes: str) -> str:
    """The last module path of a node's metadata, which is written as a Python list."""
    try:
        names = [name for name in ast.literal_eval(scopes) if name]
    except (ValueError, SyntaxError):
        return ""
    module = names[-2] if len(names) > 1 else names[-1] if names else ""  # the last is the node
    return str(module).removeprefix("module.")
