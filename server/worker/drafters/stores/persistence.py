"""Shared stores in a file over a restart: an npz archive of plain arrays, refused unless it is what we wrote.

A store that cannot be read costs its warmth and nothing else, so every fault becomes one line in the log. The file
holds token ids of finished outputs and hashes of the tenants' salts: it is as private as the outputs are.
"""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from server.worker.drafters.stores.shared import Arrays

logger = logging.getLogger(__name__)

VERSION = 1
_HEADER = "header"
_FAULTS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, OverflowError, MemoryError)


class Kept(Protocol):
    """A store that outlives its process."""

    name: str

    def save(self) -> Arrays:
        """Everything it has learnt, as plain arrays."""
        ...

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take in what `save` gave. Raises ValueError or KeyError if it is something else."""
        ...


def save_stores(file: Path, stores: list[Kept], vocab_size: int) -> bool:
    """Write the stores, whole or not at all; False if it failed, with the reason in the log."""
    arrays: Arrays = {_HEADER: _header(vocab_size)}
    for store in stores:
        arrays.update({f"{store.name}/{name}": array for name, array in store.save().items()})
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options
        partial.replace(file)
    except OSError as error:
        logger.warning("what drafters learnt is not kept, %s cannot be written: %s", file, error)
        return False
    return True


def load_stores(file: Path, stores: list[Kept], vocab_size: int) -> bool:
    """Read the stores back; False where there is no such file, or, with a line in the log, where it is not usable.

    A store that the file does not know stays empty.
    """
    if not file.exists():
        return False
    try:
        # Plain arrays only: numpy refuses pickled objects unless asked for them.
        with np.load(file) as archive:
            arrays = {name: archive[name] for name in archive.files}
        _check(arrays, vocab_size)
        for store in stores:
            own = {name.split("/", 1)[1]: array for name, array in arrays.items() if name.startswith(store.name + "/")}
            if own:
                store.load(own)
    except _FAULTS as error:
        logger.warning("what drafters had learnt is lost, %s is not used: %s: %s", file, type(error).__name__, error)
        return False
    return True


def _header(vocab_size: int) -> NDArray[np.int64]:
    """The last number shows whether tuples hash as they did in the process that wrote the file: keys depend on it."""
    return np.array([VERSION, vocab_size, hash((1, 2, 3))], dtype=np.int64)


def _check(arrays: Mapping[str, NDArray[Any]], vocab_size: int) -> None:
    header, expected = arrays[_HEADER], _header(vocab_size)
    if header.shape != expected.shape or header.dtype != expected.dtype or not (header == expected).all():
        raise ValueError(f"its header (version, vocabulary, hash) is {header.tolist()}, expected {expected.tolist()}")
    for name, array in arrays.items():
        # Ids are checked once more when they are offered; here it is about a file of another model.
        if name.endswith("/tokens") and array.size and not 0 <= array.min() <= array.max() < vocab_size:
            raise ValueError(f"{name} has ids outside of the vocabulary of {vocab_size}")
