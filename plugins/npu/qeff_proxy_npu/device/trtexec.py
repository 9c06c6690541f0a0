"""NVIDIA's ``trtexec``: raw files by ``--loadInputs``, and ``--dumpRawBindingsToFile``.

It runs once per step, in ``outputs/<group>/<step>/``, and writes there
``<tensor>.output.<dimensions>.<type>.raw``, dimensions with dots between them; what is no letter,
digit, dot, comma or dash in the name becomes an underscore.

Source: ``samples/common/sampleInference.cpp`` (``dumpRawBindingToFiles``) and ``common.h``
(``genFilenameSafeString``) of the repository NVIDIA/TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from qeff_proxy.device.index import PackedRun
from qeff_proxy.device.target import (
    Found,
    Group,
    Reader,
    Target,
    input_path,
    prepare,
    quoted,
    raw_files,
    write_raw,
)
from qeff_proxy.errors import DumpError

_FILE = re.compile(r"(?P<name>.+)\.output\.(?P<dims>(?:\d+(?:\.\d+)*)?)\.(?P<type>\w+)\Z")
#: How it spells types, in lower case.
_TYPES = {
    "float": "float32",
    "fp32": "float32",
    "float32": "float32",
    "half": "float16",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "bool": "bool",
    **{name: name for name in ("int8", "uint8", "int32", "int64")},
}


class TrtexecTarget(Target):
    """``trtexec``."""

    name = "trtexec"

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write a folder per run, and a command for each."""
        commands, engine = [], group.binary("ENGINE")
        for run in group.runs:
            prepare(group.folder, run, ".raw")
            inputs, shapes = [], []
            for tensor, array in read(run, "in"):
                path = input_path(run, tensor, ".raw")
                write_raw(group.folder / path, array)
                inputs.append(f"{tensor.name}:../../../{path}")
                shapes.append(f"{tensor.name}:{'x'.join(map(str, array.shape))}")
            place = quoted(f"outputs/{group.name}/{run.label}")
            commands.append(
                f"mkdir -p {place} && (cd {place} && trtexec --loadEngine={engine} "
                f"--shapes={quoted(','.join(shapes))} --loadInputs={quoted(','.join(inputs))} "
                "--iterations=1 --warmUp=0 --duration=0 --dumpRawBindingsToFile)"
            )
        return commands

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield the outputs in each step's folder, with the type and shape that their names say."""
        for run in group.runs:
            place = group.outputs / run.label
            if place.is_dir():
                yield run, [_said(file) for file in raw_files(place) if ".input." not in file.name]


def _said(file: Found) -> Found:
    match = _FILE.match(file.name)
    if match is None:
        return file
    dtype = _TYPES.get(match["type"].lower())
    if dtype is None:
        raise DumpError(f"{file.where} is of the type {match['type']}, which is not known")
    shape = tuple(int(size) for size in match["dims"].split(".") if size)
    return replace(file, name=match["name"], dtype=dtype, shape=shape)
