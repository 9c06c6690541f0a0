"""Hashes of files: SHA-256 for small files, BLAKE3 for weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qeff_proxy.common.direct_io import FileReader

__all__ = ["hash_weights_file", "name_digest", "new_digest", "sha256_of"]


_ALGORITHM = "blake3:"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_digest() -> Any:
    """A BLAKE3 hash to be fed: as hard to forge as SHA-256, at several times its speed."""
    from blake3 import blake3

    return blake3()


def name_digest(digest: Any) -> str:
    """How a hash of `new_digest` stands in ``export.json``."""
    return f"{_ALGORITHM}{digest.hexdigest()}"


def hash_weights_file(path: Path) -> str:
    """A weights file's hash as it stands in ``export.json``: ``"blake3:"``, 64 hex digits."""
    digest = new_digest()
    with FileReader(path) as reader:
        for piece in reader.pieces(0, reader.size):
            digest.update(piece)
    return name_digest(digest)
