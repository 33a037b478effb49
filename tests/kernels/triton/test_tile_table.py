"""Measured tile shapes: what a plan takes from them, and what a file may hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that measured tiles are used", allow_module_level=True)

from kernels.triton.tile_table import SHIPPED, TileShape, WorkClass, read_tables, trying, write_tables
from kernels.triton.tiles import Geometry, large_geometry, small_geometry

SHAPE = TileShape(16, 32, 8, 4, 3, 1)


def test_a_measured_class_has_its_shape_and_the_others_keep_the_rules() -> None:
    rules = small_geometry(4, 4, 128, 2, 100), small_geometry(32, 4, 128, 2, 100), large_geometry(4, 128, 2, 100)
    with trying({WorkClass(16, 128, 2): SHAPE, WorkClass(0, 64, 2): TileShape(64, 64, 4, 2, 1, 2)}):
        assert small_geometry(4, 4, 128, 2, 100) == Geometry(16, 32, 8, 4, 300, 1)
        assert small_geometry(32, 4, 128, 2, 100) == rules[1]
        assert large_geometry(4, 128, 2, 100) == rules[2]
        assert large_geometry(4, 48, 2, 100) == Geometry(64, 64, 4, 2, 100, 2), "heads of 48 are padded to 64"
    assert small_geometry(4, 4, 128, 2, 100) == rules[0], "a trial ends"


def test_a_shape_that_cannot_hold_the_rows_is_not_taken() -> None:
    with trying({WorkClass(0, 128, 2): TileShape(16, 64, 4, 3, 1, 2), WorkClass(32, 128, 2): SHAPE}):
        assert large_geometry(32, 128, 2, 100).tile_rows == 128
        assert small_geometry(32, 4, 128, 2, 100).tile_rows == 32


def test_float32_keeps_its_exact_shapes() -> None:
    with trying({WorkClass(16, 128, 4): SHAPE}):
        assert small_geometry(4, 4, 128, 4, 100).tile_keys == 32
        assert small_geometry(4, 4, 128, 4, 100).num_programs == 100


def test_tables_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    assert read_tables(path) == {}
    tables = {"9.0": {WorkClass(16, 128, 2): SHAPE, WorkClass(0, 64, 2): SHAPE}, "8.0": {}}
    write_tables(path, tables)
    assert read_tables(path) == tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2; expected 1"),
        ({"tables": {"9.0": [{"class": {"packed_rows": 16}, "tile": {}}]}}, "missing"),
        ({"tables": []}, "not a table"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"schema": 1, "tables": {}, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_tables(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["tile_rows", "tile_keys", "num_warps", "num_stages", "programs_per_sm", "min_tiles"])
def test_a_shape_that_no_kernel_has_is_refused(name: str) -> None:
    values = {"tile_rows": 16, "tile_keys": 64, "num_warps": 4, "num_stages": 3, "programs_per_sm": 2, "min_tiles": 2}
    for wrong in (0, 12 if name.startswith("tile") else 100):
        with pytest.raises(ValueError, match=f"{name} is {wrong}"):
            TileShape(**{**values, name: wrong})


def test_what_is_shipped_can_be_read() -> None:
    """There is none until a GPU has been measured; then it must be whole."""
    assert all(tables for tables in read_tables(SHIPPED).values())
