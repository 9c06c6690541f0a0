"""``python -m qeff_proxy``: the ``qeff-proxy`` command."""

from __future__ import annotations

import sys

from qeff_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
