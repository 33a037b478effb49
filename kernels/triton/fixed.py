"""Plans of captured steps: for each number of rows one layout that holds the plan of any mix of spans.

A captured forward launches the same programs over the same memory every time, so both geometries are always launched
(one alone where no span can be long enough for the other), with tiles for the longest span that each may get, and the
tree masks are always read. What differs from step to step is what stands in the layout: a launch without units has a
header that no program finds work in. Programs of a launch are as many as its geometry says, in any step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.triton.plan import NO_TREE, UNIT_FIELDS, StepRows, is_short, plan_launch, row_masks
from kernels.triton.tiles import SMALL_ROWS, Geometry, large_geometry, small_geometry

Ints = NDArray[np.int32]
ALIGN = 16
"""Arrays of a plan start at multiples of 64 bytes: a pointer's alignment is part of what Triton compiles for."""
_NO_WORK = (1, 1, 0, 1, 0)
"""Header of a launch without units: pieces of one tile, one tile a head (programs divide by it), none in all."""


@dataclass(frozen=True)
class FixedLayout:
    """Where the plan of a step of `num_rows` rows lies in its words: the rows' masks, then each launch's arrays.

    geometries  of short spans, and of long ones where a step of this size can have any
    """

    num_rows: int
    group: int
    num_kv: int
    window: int | None
    sinks: int
    geometries: tuple[Geometry, ...]

    def sizes(self) -> list[int]:
        """int32 words of visible, low, tree and tree_start, then of header, units and cum of each launch."""
        rows = self.num_rows
        masks = [rows, rows if self.window is not None else 1, 2 * rows, rows]
        # A unit has at least one row.
        return masks + [len(_NO_WORK), UNIT_FIELDS * rows, rows + 1] * len(self.geometries)

    @property
    def num_words(self) -> int:
        return sum(_aligned(size) for size in self.sizes())

    def on_device(self, words: Tensor) -> list[Tensor]:
        """The arrays of `sizes` as parts of int32 words on a device."""
        return [words[start : start + size] for start, size in self._places()]

    def write(self, host: StepRows, words: Ints) -> None:
        """Plan a step into words of the host. Raises ValueError if it has another number of rows."""
        if len(host.visible) != self.num_rows:
            raise ValueError(f"the step has {len(host.visible)} rows, its plan is for {self.num_rows}")
        visible, low, tree, tree_start, *launches = [words[start : start + size] for start, size in self._places()]
        masks = row_masks(host, self.window, self.sinks)
        visible[:] = masks.visible
        if masks.low is not None:
            low[:] = masks.low
        tree[:] = 0 if masks.tree is None else masks.tree.ravel()
        tree_start[:] = NO_TREE if masks.tree_start is None else masks.tree_start
        lengths = np.diff(host.span_starts)
        is_small = is_short(lengths, self.group)
        for index, geometry in enumerate(self.geometries):
            header, units, cum = launches[3 * index : 3 * index + 3]
            chosen = (~is_small if index else is_small) & (lengths > 0)
            if not chosen.any():
                header[:] = _NO_WORK
                continue
            starts = host.span_starts[:-1][chosen]
            launch = plan_launch(host.row_seq, starts, lengths[chosen], masks, self.group, self.num_kv, geometry)
            header[:] = launch.header()
            units[: launch.units.size] = launch.units.ravel()
            cum[: launch.cum.size] = launch.cum

    def _places(self) -> list[tuple[int, int]]:
        places, start = [], 0
        for size in self.sizes():
            places.append((start, size))
            start += _aligned(size)
        return places


def fixed_layout(
    num_rows: int,
    group: int,
    num_kv: int,
    head_dim: int,
    itemsize: int,
    window: int | None,
    sinks: int,
    num_sms: int,
    num_programs: int | None = None,
) -> FixedLayout:
    """The layout of steps of `num_rows` rows. num_programs overrides the geometries' own."""
    longest = max(group, min(SMALL_ROWS, num_rows * group))
    geometries = [small_geometry(longest, group, head_dim, itemsize, num_sms)]
    if num_rows * group > max(SMALL_ROWS, group):
        geometries.append(large_geometry(group, head_dim, itemsize, num_sms))
    if num_programs is not None:
        geometries = [replace(geometry, num_programs=num_programs) for geometry in geometries]
    return FixedLayout(num_rows, group, num_kv, window, sinks, tuple(geometries))


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
