"""``qnn-net-run`` and ``snpe-net-run``: raw files, an ``input_list.txt``, ``Result_N`` folders.

Each line of the list is one run, ``name:=path name:=path …``; lines that begin with ``#`` or ``%``
name outputs. Run N writes ``Result_N/<tensor>.raw``. Unless asked for native files, the tools read
and write float32, whatever the graph has; native outputs of QNN are called ``<tensor>_native.raw``.
QNN writes what is no letter or digit in a name as an underscore, and puts one before a digit.

Sources: the tools' ``--help`` and "Input list" in the documentation of Qualcomm's AI Engine Direct
SDK and of SNPE (docs.qualcomm.com); lists in the repository quic/qidk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

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

LIST = "input_list.txt"
_RESULT = re.compile(r"Result_(\d{1,9})\Z")


class NetRunTarget(Target):
    """What both tools have in common."""

    one_shape = True
    plain_dtype = "float32"
    command = ""
    variable = ""

    def write_group(self, group: Group, read: Reader) -> list[str]:
        """Write a folder per run, and the list."""
        lines = []
        for run in group.runs:
            prepare(group.folder, run, ".raw")
            words = []
            for tensor, array in read(run, "in"):
                path = input_path(run, tensor, ".raw")
                write_raw(group.folder / path, array)
                words.append(f"{self.tensor_name(tensor.name)}:={path}")
            lines.append(" ".join(words))
        text = "".join(f"{line}\n" for line in lines)
        (group.place / LIST).write_text(text, encoding="utf-8")
        native = any(
            t.dtype != "float32" for run in group.runs for t in (*run.inputs, *run.outputs)
        )
        files = " --use_native_input_files --use_native_output_files" if native else ""
        place = quoted(group.name)
        lists = f"--input_list {place}/{LIST} --output_dir outputs/{place}"
        return [f"{self.command} {group.binary(self.variable)} {lists}{files}"]

    def tensor_name(self, name: str) -> str:
        """What the tool calls an input."""
        return name

    def find_outputs(self, group: Group) -> Iterator[tuple[PackedRun, list[Found]]]:
        """Yield each ``Result_N``, whose N counts the lines of the list as it now is."""
        order = self._order(group)
        results = {
            int(match[1]): entry
            for entry in group.outputs.iterdir()
            if (match := _RESULT.match(entry.name)) and entry.is_dir()
        }
        extra = sorted(number for number in results if number >= len(order))
        if extra:
            raise DumpError(
                f"{results[extra[0]]} has no line in {group.place / LIST}, which has {len(order)}",
                "Remove what an earlier run wrote, or put the list back that was run.",
            )
        for number, run in enumerate(order):
            if number in results:
                yield run, raw_files(results[number])

    def _order(self, group: Group) -> list[PackedRun]:
        """The run of each line of the list, told by the paths in it."""
        path = group.place / LIST
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DumpError(f"{path} cannot be read: {error}") from error
        by_label = {run.label: run for run in group.runs}
        order = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith(("#", "%")):
                continue
            labels = {Path(word.rpartition(":=")[2]).parent.name for word in line.split()}
            known = labels & by_label.keys()
            if len(labels) != 1 or not known:
                raise DumpError(f"line {number} of {path} has files of {', '.join(sorted(labels))}")
            order.append(by_label[known.pop()])
        twice = next((run.label for run in order if order.count(run) > 1), None)
        if twice is not None:
            raise DumpError(f"{path} lists {twice} twice", "Leave one line out, and its Result_N.")
        return order


class QnnTarget(NetRunTarget):
    """``qnn-net-run``."""

    name = "qnn-net-run"
    command = 'qnn-net-run --backend "$BACKEND" --retrieve_context'
    variable = "BINARY"

    def tensor_name(self, name: str) -> str:
        """Letters, digits and underscores."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
        return f"_{plain}" if plain[:1].isdigit() else plain


class SnpeTarget(NetRunTarget):
    """``snpe-net-run``."""

    name = "snpe-net-run"
    command = "snpe-net-run --container"
    variable = "DLC"
