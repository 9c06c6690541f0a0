"""Stands in for Qualcomm's ``qaic-compile``: checks what it is given as strictly as it can.

It is run as a program of its own. What it was asked to do wrong comes from the environment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import onnx

FLAGS = {
    "-aic-hw",
    "-convert-to-fp16",
    "-mxfp6-matmul",
    "-aic-enable-depth-first",
    "-allow-mxint8-mdp-io",
    "-stats-batchsize",
}
VALUES = {
    "-aic-hw-version": r"ai[12]00",
    "-m": r".+\.onnx",
    "-aic-num-cores": r"\d+",
    "-mos": r"[1-9]\d*",
    "-ols": r"[1-9]\d*",
    "-network-specialization-config": r".+/specializations\.json",
    "-custom-IO-list-file": r".+/custom_io\.yaml",
    "-node-precision-info": r".+\.yaml",
    "-mdp-load-partition-config": r".+\.json",
    "-aic-binary-dir": r".+/qpc",
}


def refuse(why: str) -> None:
    sys.stderr.write(f"some noise\nERROR: {why}\n")
    sys.exit(3)


def read(arguments: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in found:
            refuse(f"{name} is given twice")
        if (name in FLAGS) == bool(equals) or (equals and name not in VALUES):
            refuse(f"unknown argument {argument}")
        if equals and not re.fullmatch(VALUES[name], value):
            refuse(f"{name} cannot be {value}")
        found[name] = value
    return found


def check(given: dict[str, str]) -> None:
    model = onnx.load(given["-m"])  # with its weights, which must lie beside it
    values = (*model.graph.input, *model.graph.output)
    axes = {d.dim_param for v in values for d in v.type.tensor_type.shape.dim if d.dim_param}
    config = json.loads(Path(given["-network-specialization-config"]).read_text())
    if os.environ.get("QAIC_FAULT") == "old":
        if any(isinstance(v, dict) for one in config["specializations"] for v in one.values()):
            refuse("network specialization config: expected a string")
        config["specializations"] = [
            {"name": str(index), "symbols": one}
            for index, one in enumerate(config["specializations"])
        ]
    names = [one["name"] for one in config["specializations"]]
    if len(set(names)) != len(names) or not names:
        refuse(f"specializations are called {names}")
    for one in config["specializations"]:
        symbols = one["symbols"]
        if set(symbols) != axes or not all(v.isdigit() for v in symbols.values()):
            refuse(f"{one} does not fix {sorted(axes)}")
        if "ctx_len" in axes and int(symbols["ctx_len"]) != int(symbols["past_len"]) + int(
            symbols["seq_len"]
        ):
            refuse("the context is not past and query")
    if "-custom-IO-list-file" in given:
        text = Path(given["-custom-IO-list-file"]).read_text()
        entries = re.findall(r" - IOName: (\S+)\n   Precision: (float16|bfloat16|mxint8)\n\n", text)
        if not entries or {name for name, _ in entries} - {value.name for value in values}:
            refuse("custom IO names what the graph has not")
    if "-node-precision-info" in given:
        first, *lines = Path(given["-node-precision-info"]).read_text().splitlines()
        outputs = {output for node in model.graph.node for output in node.output}
        listed = {json.loads(line.removeprefix("  - ")) for line in lines}
        if first != "FP32NodeInstanceNames:" or not listed or listed - outputs:
            refuse("node precision names what the graph does not compute")
    if "-mdp-load-partition-config" in given:
        partition = json.loads(Path(given["-mdp-load-partition-config"]).read_text())
        (one,) = partition["partitions"]
        if {d["numCores"] for d in one["devices"]} != {int(given["-aic-num-cores"])}:
            refuse("the partition has other cores")


if __name__ == "__main__":
    fault = os.environ.get("QAIC_FAULT", "")
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "hang":
        time.sleep(60)
    options = read(sys.argv[1:])
    check(options)
    binary = Path(options["-aic-binary-dir"])
    binary.mkdir()
    if fault != "nothing":
        (binary / "programqpc.bin").write_bytes(b"a program")
