"""Measured tile shapes as data: `measured_tiles.json` beside this file; `python -m kernels.gpu_report --tune` makes it.

One table for each compute capability; a class of work that has no entry there (and every machine without a table) keeps
the rules of `tiles.py`. The file is read once and never written here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch

SHIPPED = Path(__file__).with_name("measured_tiles.json")
SCHEMA = 1


@dataclass(frozen=True, order=True)
class WorkClass:
    """What one tile shape is for.

    packed_rows  16, 32, 64: short spans of up to so many rows x query heads per kv head; 0: long spans
    head_dim     padded to a power of two
    itemsize     bytes of an activation
    """

    packed_rows: int
    head_dim: int
    itemsize: int


@dataclass(frozen=True)
class TileShape:
    """As in `tiles.Geometry`, but programs for each multiprocessor. Raises ValueError naming what cannot be."""

    tile_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_tiles: int

    def __post_init__(self) -> None:
        for name in ("tile_rows", "tile_keys"):
            value = getattr(self, name)
            if not 16 <= value <= 256 or value & (value - 1):
                raise ValueError(f"{name} is {value}; expected a power of two from 16 to 256")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}; expected 1, 2, 4, 8 or 16")
        for name, most in (("num_stages", 8), ("programs_per_sm", 8), ("min_tiles", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {most}")


TileTable = Mapping[WorkClass, TileShape]
_NONE: TileTable = MappingProxyType({})
_trial: ContextVar[TileTable | None] = ContextVar("braid-trial-tiles", default=None)


def current_table() -> TileTable:
    """That of this process's GPU, or the one under trial; empty without a GPU or a measurement of its kind."""
    trial = _trial.get()
    return _shipped() if trial is None else trial


@contextmanager
def trying(table: TileTable) -> Iterator[None]:
    """Plans made inside use this table. For tuning and tests."""
    token = _trial.set(table)
    try:
        yield
    finally:
        _trial.reset(token)


@functools.cache
def _shipped() -> TileTable:
    if not torch.cuda.is_available():
        return _NONE
    major, minor = torch.cuda.get_device_capability()
    return read_tables(SHIPPED).get(f"{major}.{minor}", _NONE)


def read_tables(path: Path) -> dict[str, TileTable]:
    """By compute capability ("9.0"); empty if there is no file. Raises ValueError naming the file and what is wrong."""
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text())
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema is {raw['schema']}; expected {SCHEMA}")
        return {
            capability: {WorkClass(**entry["class"]): TileShape(**entry["tile"]) for entry in entries}
            for capability, entries in raw["tables"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of tiles: {error}") from error


def write_tables(path: Path, tables: Mapping[str, TileTable]) -> None:
    entries = {
        capability: [{"class": asdict(work), "tile": asdict(tile)} for work, tile in sorted(table.items())]
        for capability, table in sorted(tables.items())
    }
    path.write_text(json.dumps({"schema": SCHEMA, "tables": entries}, indent=1) + "\n")
