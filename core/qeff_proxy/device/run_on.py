"""Run a packed folder by a command: pack, run, unpack."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from qeff_proxy.device.conventions import Conventions
from qeff_proxy.device.pack_dump import SCRIPT, PackOptions, pack_dump
from qeff_proxy.device.target import OUTPUTS, Target
from qeff_proxy.device.unpack_outputs import Unpacked, unpack_outputs
from qeff_proxy.dump.reader import Dump
from qeff_proxy.errors import BackendError


def run_on(
    template: str,
    dump: Dump,
    folder: Path,
    target: Target,
    options: PackOptions,
    conventions: Conventions,
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

    Raises:
        BackendError: The command fails; quotes the last line that it wrote.
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
    done = subprocess.run(  # noqa: S602 - the user's own command, as a shell would run it
        command,
        shell=True,
        cwd=packed,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise BackendError(
            f"the command ended with exit status {done.returncode}"
            + (f": {said[-1][:500]}" if said else ""),
            "Keep the packed files with --output DIR, and run it there.",
        )
    return unpack_outputs(packed, target, index, dump, folder / "dump", conventions)
