"""From `AttentionRows` to launches: plans a step's attention once for all layers of one shape and runs it.

Owns what outlives a call: the plan of the step that ran last, the plans of captured steps, and the scratch of cut units
(two slots per program, whatever the batch). Rows that come without their host copy are read back to be planned.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.triton.attention import attend, combine
from kernels.triton.fixed import ALIGN, FixedLayout, fixed_layout
from kernels.triton.plan import Launch, StepRows, plan_step, row_masks
from kernels.triton.tiles import MAX_GROUP, Geometry, padded_dim

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMBINE_PIECES = 16
"""Pieces of a cut unit that are merged at a time."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which computes wrongly in bfloat16."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class DeviceLaunch:
    """A `plan.Launch` on the device, header, units and cum as there."""

    geometry: Geometry
    header: Tensor
    units: Tensor
    cum: Tensor


@dataclass(frozen=True)
class DevicePlan:
    """All launches of a step and the masks of its rows; `low` and the two of trees stand for nothing where unused."""

    launches: tuple[DeviceLaunch, ...]
    visible: Tensor
    low: Tensor
    tree: Tensor
    tree_start: Tensor
    has_window: bool
    has_tree: bool


@dataclass(frozen=True)
class Shape:
    """What a plan depends on besides the rows."""

    window: int | None
    num_q: int
    num_kv: int
    head_dim: int
    itemsize: int


class PagedAttention:
    """`Ops.paged_attention` on one device. num_programs overrides what each launch's tiles are shared among."""

    def __init__(self, num_sms: int, num_programs: int | None = None) -> None:
        self._num_sms = num_sms
        self._num_programs = num_programs
        self._step: AttentionRows | None = None
        self._plans: dict[Shape, DevicePlan] = {}
        self._shapes: dict[Shape, None] = {}  # seen so far, in order
        self._layouts: dict[int, dict[Shape, FixedLayout]] = {}
        # Of captured steps, by the identity of their rows, and gone with them.
        self._fixed: dict[int, tuple[weakref.ref[AttentionRows], dict[Shape, DevicePlan]]] = {}
        self._scratch: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def run(
        self, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows, scale: float, window: int | None
    ) -> Tensor:
        """Shapes and meaning as in `Ops.paged_attention`. Raises ValueError or TypeError on what no kernel can run."""
        _check(q_TQD, k_pages, v_pages, rows)
        num_q, head_dim = q_TQD.shape[1:]
        num_kv, page_size = k_pages.shape[1:3]
        plan = self.plan(rows, Shape(window, num_q, num_kv, head_dim, q_TQD.element_size()))
        q_TQD = q_TQD.contiguous()
        out_TQD = torch.empty_like(q_TQD)
        for launch in plan.launches:
            shape = launch.geometry
            partial_out, partial_lse = self._partials(shape, head_dim, q_TQD.device)
            sizes = {
                "K": num_kv,
                "G": num_q // num_kv,
                "D": head_dim,
                "DP": padded_dim(head_dim),
                "BM": shape.tile_rows,
            }
            attend[(shape.num_programs,)](
                q_TQD, k_pages, v_pages, rows.page_table, plan.low, plan.visible, plan.tree, plan.tree_start,
                launch.header, launch.units, launch.cum, out_TQD, partial_out, partial_lse,
                scale * math.log2(math.e), rows.page_table.stride(0),
                **sizes, PAGE=page_size, BN=shape.tile_keys, WINDOW=plan.has_window, TREE=plan.has_tree,
                UPCAST=is_interpreted() and q_TQD.dtype == torch.bfloat16, STAGES=shape.num_stages,
                num_warps=shape.num_warps, num_stages=shape.num_stages,
            )  # fmt: skip
            if shape.num_programs > 1:
                combine[(shape.num_programs - 1, 16)](
                    launch.header, launch.units, launch.cum, out_TQD, partial_out, partial_lse,
                    **sizes, PIECES=_COMBINE_PIECES, num_warps=2,
                )  # fmt: skip
        return out_TQD

    def plan(self, rows: AttentionRows, shape: Shape) -> DevicePlan:
        """The step's plan for one shape; made at the step's first layer, found again at the others."""
        if (fixed := self._fixed.get(id(rows))) is not None:
            return fixed[1][shape]
        if rows is not self._step:
            self._step, self._plans = rows, {}
        plan = self._plans.get(shape)
        if plan is None:
            self._shapes[shape] = None
            plan = self._plans[shape] = self._make(rows, shape)
        return plan

    def plan_words(self, num_rows: int) -> int:
        """`FixedPlans.plan_words`."""
        return sum(layout.num_words for layout in self._layouts_of(num_rows).values())

    def fix_plans(self, rows: AttentionRows, words: Tensor) -> None:
        """`FixedPlans.fix_plans`."""
        plans, start = {}, 0
        for shape, layout in self._layouts_of(len(rows.visible)).items():
            visible, low, tree, tree_start, *parts = layout.on_device(words[start : start + layout.num_words])
            launches = tuple(
                DeviceLaunch(geometry, *parts[3 * i : 3 * i + 3]) for i, geometry in enumerate(layout.geometries)
            )
            plans[shape] = DevicePlan(launches, visible, low, tree, tree_start, shape.window is not None, has_tree=True)
            start += layout.num_words
        key = id(rows)
        self._fixed[key] = (weakref.ref(rows, lambda _: self._fixed.pop(key, None)), plans)

    def write_plans(self, host: StepRows, words: NDArray[np.int32]) -> None:
        """`FixedPlans.write_plans`."""
        start = 0
        for layout in self._layouts_of(len(host.visible)).values():
            layout.write(host, words[start : start + layout.num_words])
            start += layout.num_words

    def _layouts_of(self, num_rows: int) -> dict[Shape, FixedLayout]:
        """Settled when first asked for: a shape that first runs later is of another model, which is not captured."""
        if num_rows not in self._layouts:
            self._layouts[num_rows] = {
                shape: fixed_layout(
                    num_rows, shape.num_q // shape.num_kv, shape.num_kv, shape.head_dim, shape.itemsize, shape.window,
                    self._num_sms, self._num_programs,
                )
                for shape in self._shapes
            }  # fmt: skip
        return self._layouts[num_rows]

    def _make(self, rows: AttentionRows, shape: Shape) -> DevicePlan:
        host = host_rows(rows)
        masks = row_masks(host, shape.window)
        group = shape.num_q // shape.num_kv
        launches = plan_step(host, masks, group, shape.num_kv, shape.head_dim, shape.itemsize, self._num_sms)
        if self._num_programs is not None:
            launches = [launch.shared_among(self._num_programs) for launch in launches]
        return _upload(launches, [masks.visible, masks.low, masks.tree, masks.tree_start], rows.visible.device)

    def _partials(self, geometry: Geometry, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (geometry.num_programs, geometry.tile_rows, head_dim)
        if key not in self._scratch:
            slots = (2 * geometry.num_programs, geometry.tile_rows)
            self._scratch[key] = (
                torch.full((*slots, head_dim), math.nan, dtype=torch.float32, device=device),
                torch.full(slots, math.nan, dtype=torch.float32, device=device),
            )
        return self._scratch[key]


def host_rows(rows: AttentionRows) -> StepRows:
    """What a plan needs, on the host; copied from the device where the rows came without it."""
    if rows.host is not None:
        return rows.host
    parts = (rows.row_seq, rows.positions, rows.visible, rows.span_starts)
    flat: NDArray[np.int32] = torch.cat(parts).cpu().numpy()
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    row_seq, positions, visible, span_starts = np.split(flat, bounds)
    if rows.tree is None or rows.tree_starts is None:
        return StepRows(row_seq, positions, visible, span_starts)
    return StepRows(row_seq, positions, visible, span_starts, rows.tree.cpu().numpy(), rows.tree_starts.cpu().numpy())


def _upload(launches: list[Launch], masks: list[NDArray[np.int32] | None], device: torch.device) -> DevicePlan:
    """Everything in one buffer and one copy."""
    arrays = [mask if mask is not None else np.zeros(1, np.int32) for mask in masks]
    for launch in launches:
        arrays += [launch.header(), launch.units, launch.cum]
    ends = np.cumsum([-(-array.size // ALIGN) * ALIGN for array in arrays])
    flat = np.zeros(int(ends[-1]), dtype=np.int32)
    starts = [0, *ends[:-1].tolist()]
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.size] = array.ravel()
    staged = torch.from_numpy(flat)
    buffer = staged.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else staged.to(device)
    parts = [buffer[start : start + array.size] for start, array in zip(starts, arrays, strict=True)]
    visible, low, tree, tree_start = parts[:4]
    on_device = tuple(DeviceLaunch(launch.geometry, *parts[4 + 3 * i : 7 + 3 * i]) for i, launch in enumerate(launches))
    return DevicePlan(on_device, visible, low, tree, tree_start, masks[1] is not None, masks[2] is not None)


def _check(q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows) -> None:
    if q_TQD.dtype not in DTYPES or not q_TQD.dtype == k_pages.dtype == v_pages.dtype:
        raise TypeError(
            f"q is {q_TQD.dtype}, pages are {k_pages.dtype} and {v_pages.dtype}; all must be one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if k_pages.shape != v_pages.shape or not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous and of one shape, as allocate_kv makes them")
    num_q, num_kv = q_TQD.shape[1], k_pages.shape[1]
    if num_q % num_kv or num_q // num_kv > MAX_GROUP or q_TQD.shape[2] != k_pages.shape[3]:
        raise ValueError(
            f"q is {tuple(q_TQD.shape)} and pages are {tuple(k_pages.shape)}: query heads must be a multiple of kv "
            f"heads, at most {MAX_GROUP} times, and head sizes equal"
        )
    if rows.page_table.stride(1) != 1:
        raise ValueError("page_table's rows must be contiguous")
    if (rows.tree is None) != (rows.tree_starts is None):
        raise ValueError("tree and tree_starts come together")
