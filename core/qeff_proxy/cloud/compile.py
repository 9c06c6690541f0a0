"""``python -m qeff_proxy.cloud.compile``: QEfficient's, as ``qeff-proxy compile``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qeff_proxy.cloud.program import Program, run_program, warn

#: Its options → those of ``compile``.
_OBEYED = {
    "batch_size": "--batch-size",
    "prompt_len": "--prefill-seq-len",
    "ctx_len": "--ctx-len",
    "num_cores": "--num-cores",
}


def translate(argv: Sequence[str]) -> list[str]:
    """The arguments of ``qeff-proxy`` for those of QEfficient's program.

    Raises:
        UsageError: An argument would change the answers.
    """
    program = Program("compile")
    program.option("onnx_path", required=True)
    program.options("qpc_path", *_OBEYED)
    args = program.read(argv, refused=("full_batch_size", "custom_io_file_path"))
    if args.qpc_path is not None:
        warn("--qpc_path is ignored: what is compiled lies in the folder that is printed")
    words = ["compile"]
    for name, option in _OBEYED.items():
        if getattr(args, name) is not None:
            words += [option, getattr(args, name)]
    graph = Path(args.onnx_path)
    return [*words, "--", str(graph.parent if graph.suffix == ".onnx" else graph)]


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    return run_program(translate, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
