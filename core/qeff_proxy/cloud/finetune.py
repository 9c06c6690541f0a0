"""``python -m qeff_proxy.cloud.finetune``: says that there is none."""

from __future__ import annotations

import sys


def main() -> int:
    """Say so; returns the exit code."""
    from qeff_proxy.cli.output import report_error
    from qeff_proxy.errors import UsageError

    report_error(
        "there is no finetuning here: adapters that were trained elsewhere are merged with "
        "--adapter, see docs/checkpoints.md"
    )
    return UsageError.exit_code


if __name__ == "__main__":
    sys.exit(main())
