"""Which weights a calibration is of."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHUNK_BYTES = 1 << 24


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over a checkpoint's weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
