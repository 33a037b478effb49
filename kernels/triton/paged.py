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

from kernels.blocks import PLAIN, AttentionForm
from kernels.kv_format import check_scale, head_dim_of, scale_pointers, stored_dtypes
from kernels.ops import AttentionRows
from kernels.triton.attention import attend
from kernels.triton.fixed import ALIGN, FixedLayout, fixed_layout
from kernels.triton.merge import combine, merge_parts
from kernels.triton.parts import CUT_BYTES, Parts, number_parts, shared_prefixes
from kernels.triton.plan import Ints, Launch, Prefix, RowMasks, StepRows, is_short, plan_step, row_masks
from kernels.triton.tiles import MAX_GROUP, Geometry, padded_dim

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = math.log2(math.e)
_COMBINE_PIECES = 16
"""Pieces of a cut unit that are merged at a time."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which computes wrongly in bfloat16."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class DeviceLaunch:
    """A `plan.Launch` on the device, header, units and cum as there; row_list stands for nothing where unused."""

    geometry: Geometry
    header: Tensor
    units: Tensor
    cum: Tensor
    row_list: Tensor
    is_listed: bool
    is_whole: bool


@dataclass(frozen=True)
class DeviceParts:
    """A `parts.Parts` on the device."""

    rows: Tensor
    starts: Tensor
    places: Tensor


@dataclass(frozen=True)
class DevicePlan:
    """All launches of a step and the masks of its rows; `low` and the two of trees stand for nothing where unused.

    scratch_rows  packed rows of partial results: two slots of each program, then the parts
    """

    launches: tuple[DeviceLaunch, ...]
    parts: DeviceParts | None
    scratch_rows: int
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
    sinks: int
    num_q: int
    num_kv: int
    head_dim: int
    page_size: int
    itemsize: int
    kv_itemsize: int


class PagedAttention:
    """`Ops.paged_attention` on one device.

    num_programs   overrides what each launch's tiles are shared among
    deterministic  a row's bits do not depend on the sequences beside it (`plan_step`); no cascade
    cascade        keys that short spans share are read once for all of them, where it pays
    """

    def __init__(
        self, num_sms: int, num_programs: int | None = None, deterministic: bool = False, cascade: bool = True
    ) -> None:
        self._num_sms = num_sms
        self._num_programs = num_programs
        self._deterministic, self._cascade = deterministic, cascade and not deterministic
        self._step: AttentionRows | None = None
        self._plans: dict[Shape, DevicePlan] = {}
        self._shapes: dict[Shape, None] = {}  # seen so far, in order
        self._layouts: dict[int, dict[Shape, FixedLayout]] = {}
        # Of captured steps, by the identity of their rows, and gone with them.
        self._fixed: dict[int, tuple[weakref.ref[AttentionRows], dict[Shape, DevicePlan]]] = {}
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None,
        form: AttentionForm = PLAIN,
        kv_scale_2K: Tensor | None = None,
    ) -> Tensor:
        """Shapes and meaning as in `Ops.paged_attention`. Raises ValueError or TypeError on what no kernel can run."""
        _check(q_TQD, k_pages, v_pages, rows, form, kv_scale_2K)
        num_q, head_dim = q_TQD.shape[1:]
        num_kv, page_size = k_pages.shape[1:3]
        sinks = 0 if window is None else form.sinks
        plan = self.plan(
            rows,
            Shape(window, sinks, num_q, num_kv, head_dim, page_size, q_TQD.element_size(), k_pages.dtype.itemsize),
        )
        q_TQD = q_TQD.contiguous()
        out_TQD = torch.empty_like(q_TQD)
        partial_out, partial_lse = self._partials(plan.scratch_rows, head_dim, q_TQD.device)
        sizes = {"K": num_kv, "G": num_q // num_kv, "D": head_dim, "DP": padded_dim(head_dim)}
        has_logits = form.sink_logits_Q is not None
        sink_logits = partial_lse if form.sink_logits_Q is None else form.sink_logits_Q.float() * LOG2_E
        for launch in plan.launches:
            shape = launch.geometry
            attend[(shape.num_programs,)](
                q_TQD, k_pages, v_pages, *scale_pointers(k_pages, v_pages, kv_scale_2K), rows.page_table,
                plan.low, plan.visible, plan.tree, plan.tree_start, launch.row_list, sink_logits,
                launch.header, launch.units, launch.cum, out_TQD, partial_out, partial_lse,
                scale * LOG2_E, form.softcap * LOG2_E, rows.page_table.stride(0),
                **sizes, PAGE=page_size, PAD=k_pages.shape[3] - head_dim, BM=shape.tile_rows, BN=shape.tile_keys,
                WINDOW=plan.has_window, SINKS=sinks, TREE=plan.has_tree, LISTED=launch.is_listed,
                HEAD_SCALE=kv_scale_2K is not None, TOKEN_SCALE=k_pages.dtype == torch.int8,
                SOFTCAP=form.softcap != 0, SINK_LOGITS=has_logits,
                UPCAST=is_interpreted() and q_TQD.dtype == torch.bfloat16, STAGES=shape.num_stages,
                num_warps=shape.num_warps, num_stages=shape.num_stages,
            )  # fmt: skip
            if shape.num_programs > 1 and not launch.is_whole:
                combine[(shape.num_programs - 1, 16)](
                    launch.row_list, sink_logits, launch.header, launch.units, launch.cum, out_TQD,
                    partial_out, partial_lse, **sizes, BM=shape.tile_rows, LISTED=launch.is_listed,
                    SINK_LOGITS=has_logits, PIECES=_COMBINE_PIECES, num_warps=2,
                )  # fmt: skip
        if plan.parts is not None:
            parts = plan.parts
            merge_parts[(len(parts.rows), num_q)](
                parts.rows, parts.starts, parts.places, sink_logits, out_TQD, partial_out, partial_lse,
                **sizes, SINK_LOGITS=has_logits, PIECES=_COMBINE_PIECES, num_warps=2,
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
            plans[shape] = DevicePlan(
                launches=tuple(
                    DeviceLaunch(geometry, header, units, cum, low, is_listed=False, is_whole=False)
                    for geometry, header, units, cum in zip(
                        layout.geometries, parts[::3], parts[1::3], parts[2::3], strict=True
                    )
                ),
                parts=None,
                scratch_rows=max(2 * geometry.num_programs * geometry.tile_rows for geometry in layout.geometries),
                visible=visible,
                low=low,
                tree=tree,
                tree_start=tree_start,
                has_window=shape.window is not None,
                has_tree=True,
            )
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
                    shape.sinks, self._num_sms, self._num_programs,
                )
                for shape in self._shapes
            }  # fmt: skip
        return self._layouts[num_rows]

    def _make(self, rows: AttentionRows, shape: Shape) -> DevicePlan:
        host, first_pages = host_rows(rows)
        masks = row_masks(host, shape.window, shape.sinks)
        group = shape.num_q // shape.num_kv
        prefixes = []
        if self._cascade and shape.window is None:
            prefixes = self._prefixes(rows.page_table, first_pages, host, masks, shape)
        launches = plan_step(
            host, masks, group, shape.num_kv, shape.head_dim, shape.itemsize, self._num_sms, prefixes,
            self._deterministic,
        )  # fmt: skip
        if self._num_programs is not None:
            launches = [launch.shared_among(self._num_programs) for launch in launches]
        slots = max((2 * launch.geometry.num_programs * launch.geometry.tile_rows for launch in launches), default=0)
        launches, parts = number_parts(launches, group, shape.num_kv, slots)
        return _upload(launches, parts, slots, masks, rows.visible.device)

    def _prefixes(
        self, page_table: Tensor, first_pages: Ints, host: StepRows, masks: RowMasks, shape: Shape
    ) -> list[Prefix]:
        """What several short spans of a step share, if reading it once pays (`attention.md` 2.11)."""
        key_bytes = 2 * shape.head_dim * shape.kv_itemsize * shape.num_kv
        num_programs = self._num_programs or 2 * self._num_sms

        def pays(num_keys: int, num_spans: int) -> bool:
            return num_keys * (num_spans - 1) * key_bytes > CUT_BYTES * (num_spans + num_programs)

        lengths = np.diff(host.span_starts)
        spans = np.flatnonzero(is_short(lengths, shape.num_q // shape.num_kv) & (lengths > 0))
        if len(spans) < 2:
            return []
        starts = host.span_starts[:-1]
        plain = masks.visible if masks.tree_start is None else np.minimum(masks.visible, masks.tree_start)
        limits = np.minimum.reduceat(plain, starts[lengths > 0])[np.cumsum(lengths > 0)[spans] - 1]
        seqs = host.row_seq[starts[spans]]
        # A page that two sequences share is one of a common beginning, so the first one tells who may share more.
        _, which, counts = np.unique(first_pages[seqs], return_inverse=True, return_counts=True)
        alike = (counts[which] > 1) & (limits >= shape.page_size)
        if not pays(int(limits[alike].max(initial=0)), int(alike.sum())):
            return []
        spans, seqs, limits = spans[alike], seqs[alike], limits[alike]
        most = int(limits.max()) // shape.page_size
        if host.page_table is None:
            tables = page_table[torch.from_numpy(seqs).to(page_table.device).long(), :most].cpu().numpy()
        else:
            tables = host.page_table[seqs, :most]
        return shared_prefixes(spans, tables, limits, shape.page_size, pays)

    def _partials(self, num_rows: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scratch of at least as many packed rows; it grows with the parts that a step has."""
        known = self._scratch.get(head_dim)
        if known is None or len(known[1]) < num_rows:
            known = self._scratch[head_dim] = (
                torch.full((num_rows, head_dim), math.nan, dtype=torch.float32, device=device),
                torch.full((num_rows,), math.nan, dtype=torch.float32, device=device),
            )
        return known


def host_rows(rows: AttentionRows) -> tuple[StepRows, Ints]:
    """What a plan needs on the host, and each sequence's first page; copied from the device where rows came without it,
    in one transfer, three with draft trees."""
    if rows.host is not None:
        table = rows.host.page_table
        return rows.host, rows.page_table[:, 0].cpu().numpy() if table is None else table[:, 0]
    parts = (rows.row_seq, rows.positions, rows.visible, rows.span_starts, rows.page_table[:, 0])
    flat: NDArray[np.int32] = torch.cat(parts).cpu().numpy()
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    row_seq, positions, visible, span_starts, first_pages = np.split(flat, bounds)
    if rows.tree is None or rows.tree_starts is None:
        return StepRows(row_seq, positions, visible, span_starts), first_pages
    trees = rows.tree.cpu().numpy(), rows.tree_starts.cpu().numpy()
    return StepRows(row_seq, positions, visible, span_starts, *trees), first_pages


def _upload(
    launches: list[Launch], parts: Parts | None, slots: int, masks: RowMasks, device: torch.device
) -> DevicePlan:
    """Everything in one buffer and one copy."""
    nothing = np.zeros(1, np.int32)
    optional = [masks.visible, masks.low, masks.tree, masks.tree_start]
    optional += [None, None, None] if parts is None else [parts.rows, parts.starts, parts.places]
    arrays = [nothing if array is None else array for array in optional]
    for launch in launches:
        arrays += [
            launch.header(), launch.units, launch.cum, nothing if launch.row_list is None else launch.row_list
        ]  # fmt: skip
    ends = np.cumsum([-(-array.size // ALIGN) * ALIGN for array in arrays])
    flat = np.zeros(int(ends[-1]), dtype=np.int32)
    starts = [0, *ends[:-1].tolist()]
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.size] = array.ravel()
    staged = torch.from_numpy(flat)
    buffer = staged.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else staged.to(device)
    on_device = [buffer[start : start + array.size] for start, array in zip(starts, arrays, strict=True)]
    visible, low, tree, tree_start, part_rows, part_starts, places = on_device[:7]
    uploaded = []
    for at, launch in zip(range(7, len(on_device), 4), launches, strict=True):
        header, units, cum, row_list = on_device[at : at + 4]
        is_listed = launch.row_list is not None
        uploaded.append(DeviceLaunch(launch.geometry, header, units, cum, row_list, is_listed, launch.is_whole))
    return DevicePlan(
        launches=tuple(uploaded),
        parts=None if parts is None else DeviceParts(part_rows, part_starts, places),
        scratch_rows=slots + (0 if parts is None else parts.num_places),
        visible=visible,
        low=low,
        tree=tree,
        tree_start=tree_start,
        has_window=masks.low is not None,
        has_tree=masks.tree is not None,
    )


def _check(
    q_TQD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: AttentionRows,
    form: AttentionForm,
    kv_scale_2K: Tensor | None,
) -> None:
    if q_TQD.dtype not in DTYPES or k_pages.dtype != v_pages.dtype or k_pages.dtype not in stored_dtypes(q_TQD.dtype):
        raise TypeError(
            f"q is {q_TQD.dtype}, pages are {k_pages.dtype} and {v_pages.dtype}; q must be one of "
            f"{', '.join(map(str, DTYPES))}, and pages of that dtype, int8 or float8_e4m3fn"
        )
    if k_pages.shape != v_pages.shape or not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous and of one shape, as allocate_kv makes them")
    num_q, num_kv = q_TQD.shape[1], k_pages.shape[1]
    if num_q % num_kv or num_q // num_kv > MAX_GROUP or q_TQD.shape[2] != head_dim_of(k_pages):
        raise ValueError(
            f"q is {tuple(q_TQD.shape)} and pages are {tuple(k_pages.shape)}: query heads must be a multiple of kv "
            f"heads, at most {MAX_GROUP} times, and head sizes equal"
        )
    if rows.page_table.stride(1) != 1:
        raise ValueError("page_table's rows must be contiguous")
    if (rows.tree is None) != (rows.tree_starts is None):
        raise ValueError("tree and tree_starts come together")
    if form.sinks < 0 or form.softcap < 0 or (form.sink_logits_Q is not None and form.sink_logits_Q.shape != (num_q,)):
        raise ValueError(
            f"sinks and softcap must not be negative, and sink_logits must be one for each of {num_q} heads"
        )
    check_scale(k_pages, kv_scale_2K)
