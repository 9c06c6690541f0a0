"""A hash of installed Python code, so that an edited installation makes its results anew."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def code_digest(name: str) -> str | None:
    """Hash all Python code of a top-level package, or the file of a top-level module.

    Args:
        name: Of the package or module, which need not be imported.

    Returns:
        16 hexadecimal digits; ``None`` where the code lies in no file.
    """
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # ``__main__``, and modules that were not imported from a file
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    elif spec.origin is not None and Path(spec.origin).is_file():
        files = [Path(spec.origin)]
    else:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
