"""``python -m qeff_proxy.cloud.export``: QEfficient's, as ``qeff-proxy export``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from qeff_proxy.cloud.program import Program, model_of, run_program


def translate(argv: Sequence[str]) -> list[str]:
    """The arguments of ``qeff-proxy`` for those of QEfficient's program."""
    program = Program("export")
    program.model()
    return ["export", "--", model_of(program.read(argv))]


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    return run_program(translate, argv)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"there is no {__name__}.{name}: qeff-proxy export MODEL exports")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
