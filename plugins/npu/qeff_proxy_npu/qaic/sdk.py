"""Where Qualcomm's Cloud AI SDKs lie: compiler (apps SDK) and runner (platform SDK)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from qeff_proxy.errors import BackendError

__all__ = ["EXECUTABLES", "find_compiler", "find_hardware_version", "find_runner"]

#: Where the SDK installs its executables.
EXECUTABLES = Path("/opt/qti-aic/exec")
_TOOLS = Path("/opt/qti-aic/tools")


def find_compiler(given: str | None = None) -> Path:
    """The vendor's ``qaic-compile``.

    Args:
        given: A path that the user named; else ``/opt/qti-aic/exec`` and ``PATH`` are looked
            through.

    Raises:
        BackendError: It is not there.
    """
    if given is not None:
        path = Path(given).expanduser()
        if shutil.which(path) is None:
            raise BackendError(
                f"{path} is no executable", "Name Qualcomm's qaic-compile with -O compiler=PATH."
            )
        return path.absolute()
    found = _find("qaic-compile")
    if found is None:
        raise BackendError(
            f"there is no qaic-compile in {EXECUTABLES} or on PATH",
            "Install Qualcomm's Cloud AI Apps SDK, or name the compiler with -O compiler=PATH.",
        )
    return found


def find_runner() -> Path | None:
    """The vendor's ``qaic-runner``, or ``None``."""
    return _find("qaic-runner")


def find_hardware_version() -> str:
    """``"ai200"`` where the first card is one, else ``"ai100"``, by the SDK's ``qaic-util -q``."""
    tool = _TOOLS / "qaic-util"
    try:
        said = subprocess.run(  # noqa: S603 (the SDK's own tool)
            [tool, "-q"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "ai100"
    variant = re.search(r"FW IMAGE_VARIANT\s*:\s*(\S+)", said)
    return "ai200" if variant is not None and "AIC200" in variant[1].upper() else "ai100"


def _find(name: str) -> Path | None:
    found = shutil.which(EXECUTABLES / name) or shutil.which(name)
    return Path(found) if found is not None else None
