"""Run a packed folder by a command: pack, run, unpack."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path

from qeff_proxy.device.conventions import Conventions
from qeff_proxy.device.pack_dump import SCRIPT, PackOptions, pack_dump
from qeff_proxy.device.target import OUTPUTS, Target
from qeff_proxy.device.unpack_outputs import Unpacked, unpack_outputs
from qeff_proxy.dump.reader import Dump
from qeff_proxy.errors import BackendError

#: Characters; a longer line is shown in pieces.
_LONGEST_LINE = 1 << 16


def run_on(
    template: str,
    dump: Dump,
    folder: Path,
    target: Target,
    options: PackOptions,
    conventions: Conventions,
    show: Callable[[str], None] = lambda _line: None,
) -> Unpacked:
    """Pack a dump, run a command, and make a dump of its outputs.

    Args:
        template: A command for ``sh``, which runs in the packed folder. ``{folder}`` stands for
            its path, ``{outputs}`` for the outputs', ``{run}`` for the target's own commands.
        dump: The reference.
        folder: New; gets ``packed`` and ``dump``.
        target: The tool.
        options: How to pack.
        conventions: How to read what came back.
        show: Gets each line that the command writes, as it writes it.

    Raises:
        BackendError: The command fails, or writes no outputs; quotes the last line that it wrote.
    """
    packed = (folder / "packed").absolute()
    index = pack_dump(dump, packed, target, options)
    values = {
        "folder": shlex.quote(str(packed)),
        "outputs": shlex.quote(str(packed / OUTPUTS)),
        "run": f"sh {shlex.quote(str(packed / SCRIPT))}",
    }
    # In one pass: a path may hold what looks like a name.
    command = re.sub("{(folder|outputs|run)}", lambda name: values[name[1]], template)
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(  # noqa: S602 - the user's own command, as a shell would run it
        command,
        shell=True,
        cwd=packed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        while line := process.stdout.readline(_LONGEST_LINE):
            if line.strip():
                last.append(line.strip())
                show(line.rstrip("\n"))
    said = f": {last[0][:500]}" if last else ""
    if process.returncode:
        raise BackendError(
            f"the command ended with exit status {process.returncode}{said}",
            "Keep the packed files with --output DIR, and run it there.",
        )
    outputs = packed / OUTPUTS
    if not outputs.is_dir() or not any(not path.is_dir() for path in outputs.rglob("*")):
        raise BackendError(
            f"the command left no file below {outputs}{said}",
            "Let it copy what the tool wrote to {outputs}.",
        )
    return unpack_outputs(packed, target, index, dump, folder / "dump", conventions)
