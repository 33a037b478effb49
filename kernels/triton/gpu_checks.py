"""Checks of every kernel that need no test library: for `kernels.gpu_report` on a GPU, and interpreted on any CPU.

Attention is compared with float64 attention whose masks come from the kinds of spans, not from the arrays that kernels
read; every element has a bound from its own data. Memory behind a sequence's last key is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.blocks import PLAIN, AttentionForm
from kernels.kv_format import FP8, read_pages, write_slots
from kernels.ops import AttentionRows, Ops
from kernels.reference import ReferenceOps
from kernels.routing import Router
from kernels.triton.gpu_twins import FILTERS, edits_error, experts_error, filter_errors, filters_of
from kernels.triton.moe import ExpertStack
from kernels.triton.norm import add_rms_norm
from kernels.triton.ops import TritonOps

MASK_ALL = 1 << 30
SHAPES = [
    (8, 2, 128, 64, None), (7, 1, 64, 16, None), (6, 2, 80, 32, 37), (4, 4, 96, 7, None), (24, 1, 64, 64, 100),
    (2, 1, 256, 64, None),
]  # fmt: skip
"""Query heads, kv heads, head size, page size, window."""
"""min_p, top_k, top_p."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Span:
    """The last `num_rows` of `kv_len` keys: causal, in blocks, bidirectional (MASK_ALL), or a tree with parents."""

    kv_len: int
    num_rows: int
    mask_block: int = 1
    parents: tuple[int, ...] = ()

    def path(self, row: int) -> list[int]:
        path: list[int] = []
        while row >= 0:
            path.insert(0, row)
            row = self.parents[row]
        return path

    def positions(self) -> list[int]:
        start = self.kv_len - self.num_rows
        return [start + (len(self.path(row)) - 1 if self.parents else row) for row in range(self.num_rows)]

    def visible(self) -> list[int]:
        block = self.mask_block
        return [min(self.kv_len, (at // block + 1) * block) for at in range(self.kv_len - self.num_rows, self.kv_len)]

    def seen(self, window: int | None, sinks: int = 0) -> Tensor:
        """Which keys each row sees, bool [rows, keys]."""
        start = self.kv_len - self.num_rows
        at, positions = torch.arange(self.kv_len), torch.tensor(self.positions())[:, None]
        if not self.parents:
            seen = at < torch.tensor(self.visible())[:, None]
            return seen if window is None else seen & ((at > positions - window) | (at < sinks))
        seen = (at < start).repeat(self.num_rows, 1)
        for row in range(self.num_rows):
            seen[row, [start + node for node in self.path(row)]] = True
        depths = at.clone()
        depths[start:] = positions[:, 0]
        return seen if window is None else seen & ((depths > positions - window) | (at < min(sinks, start)))


@dataclass(frozen=True)
class World:
    """Spans over shuffled pages of random keys, and random queries for their rows."""

    spans: Sequence[Span]
    rows: AttentionRows
    q_TQD: Tensor
    k_pages: Tensor
    v_pages: Tensor


def make_world(
    spans: Sequence[Span], num_q: int, num_kv: int, head_dim: int, page: int, dtype: torch.dtype, device: torch.device
) -> World:
    """A step of the spans, one sequence each."""
    generator = torch.Generator().manual_seed(len(spans))
    counts = [-(-span.kv_len // page) for span in spans]
    order = torch.randperm(sum(counts) + 1, generator=generator, dtype=torch.int64).to(torch.int32)
    table = torch.full((len(spans), max(counts)), -7, dtype=torch.int32)
    parts: list[list[int]] = [[], [], [], [], []]
    slots, bounds, used = [], [0], 0
    for index, (span, count) in enumerate(zip(spans, counts, strict=True)):
        table[index, :count] = order[used : used + count]
        used += count
        start = span.kv_len - span.num_rows
        at = torch.arange(start, span.kv_len)
        slots.append(table[index, at // page].long() * page + at % page)
        masks = [sum(1 << node for node in span.path(row)) if span.parents else 0 for row in range(span.num_rows)]
        signed = [mask - (1 << 64) if mask >> 63 else mask for mask in masks]
        columns = ([index] * span.num_rows, span.positions(), span.visible(), signed, [start] * span.num_rows)
        for part, column in zip(parts, columns, strict=True):
            part += column
        bounds.append(len(parts[0]))
    row_seq, positions, visible, starts = (torch.tensor(parts[i], dtype=torch.int32) for i in (0, 1, 2, 4))
    has_tree = any(parts[3])
    rows = AttentionRows(
        table.to(device), row_seq.to(device), positions.to(device), visible.to(device), torch.cat(slots).to(device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        torch.tensor(parts[3], device=device) if has_tree else None,
        starts.to(device) if has_tree else None,
    )  # fmt: skip
    shape = (sum(counts) + 1, num_kv, page, head_dim)
    k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    for index, span in enumerate(spans):
        if span.kv_len % page:
            last = int(table[index, counts[index] - 1])
            k[last, :, span.kv_len % page :] = v[last, :, span.kv_len % page :] = math.nan
    return World(spans, rows, torch.randn(bounds[-1], num_q, head_dim, dtype=dtype, device=device), k, v)


def worst_error(
    world: World, actual_TQD: Tensor, scale: float, window: int | None, form: AttentionForm = PLAIN
) -> float:
    """Greatest error as a share of its bound (1 and less is right), bounds as in `attention.md` 5.2."""
    head_dim = world.q_TQD.shape[2]
    u_p, u_out = {torch.float32: (0.0, 2.0**-24), torch.float16: (2.0**-11,) * 2, torch.bfloat16: (2.0**-8,) * 2}[
        actual_TQD.dtype
    ]
    worst, first = 0.0, 0
    page, device = world.k_pages.shape[2], world.q_TQD.device
    for index, span in enumerate(world.spans):
        pages = world.rows.page_table[index, : -(-span.kv_len // page)].long()
        k, v = (
            pool[pages].transpose(0, 1).flatten(1, 2)[:, : span.kv_len].double()  # [K, N, D]
            for pool in (world.k_pages, world.v_pages)
        )
        q = world.q_TQD[first : first + span.num_rows].double()
        q = q.view(span.num_rows, len(k), -1, head_dim)  # [R, K, G, D]
        scores = torch.einsum("rkgd,knd->kgrn", q, k) * scale
        if form.softcap:
            scores = form.softcap * (scores / form.softcap).tanh()
        scores = scores.masked_fill(~span.seen(window, form.sinks).to(device), -math.inf)
        if form.sink_logits_Q is not None:
            sinks = form.sink_logits_Q.double().view(*scores.shape[:2], 1, 1).expand(-1, -1, span.num_rows, 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)[..., : span.kv_len]
        expected = torch.einsum("kgrn,knd->rkgd", weights, v).flatten(1, 2)
        mass = torch.einsum("kgrn,knd->rkgd", weights, v.abs()).flatten(1, 2)
        bound = 2 * (u_p * mass + u_out * expected.abs()) + (head_dim + 64) * 2.0**-23 * mass + 2.0**-24
        error = (actual_TQD[first : first + span.num_rows].double() - expected).abs() / bound
        worst = max(worst, float(error.nan_to_num(math.inf).max()))
        first += span.num_rows
    return worst


TREE = (-1, 0, 0, 1, 1, 2, 5, 3, 3, 6)
MIXED = [
    Span(1, 1), Span(64, 1), Span(700, 1), Span(1025, 1), Span(90, 90), Span(530, 10, parents=TREE), Span(512, 32, 32),
    Span(333, 5), Span(130, 130, MASK_ALL), Span(400, 260),
]  # fmt: skip
SMALL = [Span(70, 1), Span(40, 33), Span(70, 10, parents=TREE), Span(32, 16, 16), Span(20, 20, MASK_ALL)]


def attention_checks(ops: TritonOps, device: torch.device, spans: Sequence[Span]) -> Iterator[tuple[str, float]]:
    """(what, worst error as a share of its bound) over dtypes, groups, head sizes, pages and windows."""
    for dtype in DTYPES:
        for num_q, num_kv, head_dim, page, window in SHAPES:
            world = make_world(spans, num_q, num_kv, head_dim, page, dtype, device)
            scale = head_dim**-0.5
            out = ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, scale, window)
            what = f"attention {dtype} Q{num_q} K{num_kv} D{head_dim} page {page} window {window}"
            yield what, worst_error(world, out, scale, window)
        world = make_world(spans, 6, 2, 64, 32, dtype, device)
        for form, window in forms(6, device):
            out = ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.125, window, form)
            named = f"softcap {form.softcap:g}, sinks {form.sinks}, logits {form.sink_logits_Q is not None}"
            yield f"attention {dtype} window {window}, {named}", worst_error(world, out, 0.125, window, form)
        for stored in (FP8, torch.int8):
            if stored in ops.kv_dtypes(dtype):
                yield f"attention {dtype} over {stored} pages", stored_error(ops, world, stored)


def forms(num_q: int, device: torch.device) -> list[tuple[AttentionForm, int | None]]:
    """Every departure from plain attention, alone or beside others, and a window."""
    logits = torch.linspace(-2, 4, num_q, device=device)
    return [
        (AttentionForm(sinks=4), 37),
        (AttentionForm(softcap=3.0), None),
        (AttentionForm(sink_logits_Q=logits), None),
        (AttentionForm(softcap=30.0, sinks=70, sink_logits_Q=logits), 16),
    ]


def stored_error(ops: Ops, world: World, stored: torch.dtype, window: int | None = None) -> float:
    """`worst_error` over pages of another dtype, against what these hold: how they are rounded is another test's."""
    num_pages, num_kv, page, head_dim = world.k_pages.shape
    scale_2K = None
    if stored == FP8:
        scale_2K = torch.rand(2, num_kv, device=world.k_pages.device) + 0.5
    slots = torch.arange(num_pages * page, device=world.k_pages.device)
    pages, values = ops.allocate_kv(num_pages, page, num_kv, head_dim, stored, world.k_pages.device), []
    for index, (pool, into) in enumerate(zip((world.k_pages, world.v_pages), pages, strict=True)):
        scale_K = None if scale_2K is None else scale_2K[index]
        write_slots(into, slots, pool.transpose(1, 2).flatten(0, 1), scale_K)
        values.append(read_pages(into, scale_K))
    out = ops.paged_attention(world.q_TQD, *pages, world.rows, head_dim**-0.5, window, PLAIN, scale_2K)
    return worst_error(replace(world, k_pages=values[0], v_pages=values[1]), out, head_dim**-0.5, window)


def twin_checks(
    ops: TritonOps, device: torch.device, vocab: int, expert_rows: Sequence[int] = (1, 9, 400, 4000)
) -> Iterator[tuple[str, float]]:
    """(what, worst difference from the plain-torch twin as a share of what rounding explains) of all other kernels.

    expert_rows  steps of so many rows go through 6 experts: with the default, all tile shapes
    """
    twin = ReferenceOps()

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def share(actual: Tensor, expected: Tensor, unit: float) -> float:
        error = (actual.double() - expected.double()).abs() / (unit * (expected.double().abs() + 0.125))
        return float(error.nan_to_num(math.inf).max())

    for dtype, unit in zip(DTYPES, (2.0**-7, 2.0**-10, 2.0**-20), strict=True):
        x, change, weight = random(5, 1000, dtype=dtype), random(5, 1000, dtype=dtype), random(1000, dtype=dtype)
        yield f"rms_norm {dtype}", share(ops.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5), unit)
        normed, total = add_rms_norm(change, x, weight, 1e-5)
        yield f"add_rms_norm {dtype}", share(normed, twin.rms_norm(total, weight, 1e-5), unit)
        yield f"silu_mul {dtype}", share(ops.silu_mul(x), twin.silu_mul(x), unit)
        yield f"logits {dtype}", _logits_error(ops, random(5, 256, dtype=dtype), random(999, 256, dtype=dtype))
        yield f"qkv_rope_write {dtype}", _rope_error(ops, twin, dtype, device, unit)
        gate_up, down = (ExpertStack(random(6, *size, dtype=dtype) / 8) for size in ((160, 72), (72, 80)))
        for num_rows in expert_rows:
            x, logits, router = random(num_rows, 72, dtype=dtype), random(num_rows, 6) * 2, Router(2, True)
            error = experts_error(ops.moe(x, logits, router, gate_up, down), x, logits, router, gate_up, down)
            yield f"moe {dtype} {num_rows} rows", error
        k, v = random(5, 2, 7, 40, dtype=dtype), random(5, 2, 7, 40, dtype=dtype)
        copies = k.clone(), v.clone()
        moves = torch.tensor([8, 9, 30, 3], device=device), torch.tensor([7, 8, 3, 4], device=device)
        ops.move_kv(k, v, *moves)
        twin.move_kv(*copies, *moves)
        yield f"move_kv {dtype}", 0.0 if torch.equal(k, copies[0]) and torch.equal(v, copies[1]) else math.inf
        for stored in (FP8, torch.int8):
            if stored in ops.kv_dtypes(dtype):
                yield f"pages of {stored} from {dtype}", _stored_rows_error(ops, twin, dtype, stored, device)
    logits = random(3, vocab) * 3
    logits[1, ::3] = -math.inf
    ids = torch.tensor([0, 1, vocab - 1], device=device)
    found, wanted = ops.row_statistics(logits, ids), ReferenceOps().row_statistics(logits, ids)
    yield "row_statistics best_id", 0.0 if torch.equal(found.best_id, wanted.best_id) else math.inf
    for field in ("best", "second", "lse", "entropy", "logit"):
        yield f"row_statistics {field}", share(getattr(found, field), getattr(wanted, field), 2.0**-16)
    yield "edit_logits", edits_error(ops, random(9, vocab) * 5)
    yield from filter_errors(ops, random(len(FILTERS), vocab) * 3)
    key = ids * 77, ids + (3 << 16), ids
    greedy = ids == 1
    for stream in (0, 1, 0xFFFFFFFF):
        same = torch.equal(ops.sample(logits, *key, greedy, stream), twin.sample(logits, *key, greedy, stream))
        yield f"sample stream {stream}", 0.0 if same else math.inf


def _logits_error(ops: TritonOps, x_JK: Tensor, weight_VK: Tensor) -> float:
    """Against float64; a product rounded to 16 bits on the way is a thousand times over this bound."""
    actual = ops.logits(x_JK, ops.pack_linear(weight_VK))
    expected = x_JK.double() @ weight_VK.double().T
    mass = x_JK.double().abs() @ weight_VK.double().abs().T
    return float(((actual.double() - expected).abs() / (x_JK.shape[1] * 2.0**-23 * mass)).max())


def _rope_error(ops: TritonOps, twin: ReferenceOps, dtype: torch.dtype, device: torch.device, unit: float) -> float:
    """In units of each head's greatest value: two rounded elements turn with each other and may cancel."""
    head_dim, page = 80, 16
    world = make_world([Span(30, 6), Span(9, 3)], 5, 2, head_dim, page, dtype, device)
    qkv = torch.randn(9, 9 * head_dim, dtype=dtype, device=device)
    angles = torch.rand(64, 24, device=device) * 6
    table, weight = torch.cat((angles.cos(), angles.sin()), 1), torch.randn(head_dim, dtype=dtype, device=device)
    results = []
    for back_end in (ops, twin):
        k, v = world.k_pages.clone().zero_(), world.v_pages.clone().zero_()
        args = (qkv, 5, 2, head_dim, table, weight, weight, 1e-6, k, v, world.rows)
        results.append((back_end.qkv_rope_write(*args), k, v))
    worst = 0.0
    for actual, expected in zip(*results, strict=True):
        bound = 2 * unit * expected.double().abs().amax(-1, keepdim=True).clamp_min(1.0)
        worst = max(worst, float(((actual.double() - expected.double()).abs() / bound).nan_to_num(math.inf).max()))
    return worst


def _stored_rows_error(
    ops: Ops, twin: ReferenceOps, dtype: torch.dtype, stored: torch.dtype, device: torch.device
) -> float:
    """Bytes that differ after a write and moves, as a share of those a rotation rounded otherwise may change."""
    head_dim, page, num_kv = 80, 16, 2
    world = make_world([Span(30, 6), Span(9, 3)], 5, num_kv, head_dim, page, dtype, device)
    qkv = torch.randn(9, (5 + 2 * num_kv) * head_dim, dtype=dtype, device=device) * 3
    qkv[1] = 0.0
    table = torch.cat((torch.ones(64, 24, device=device), torch.zeros(64, 24, device=device)), 1)  # no rotation
    scale_2K = torch.tensor([[0.25, 1.0], [0.003, 2.0]], device=device) if stored == FP8 else None
    moves = world.rows.slots[:3], world.rows.slots[4:7]
    results = []
    for back_end in (ops, twin):
        pages = back_end.allocate_kv(len(world.k_pages), page, num_kv, head_dim, stored, device)
        for pool in pages:
            pool.view(torch.uint8).fill_(0)
        back_end.qkv_rope_write(qkv, 5, num_kv, head_dim, table, None, None, 1e-6, *pages, world.rows, scale_2K)
        back_end.move_kv(*pages, *moves)
        results.append(torch.stack(pages).view(torch.uint8))
    return 0.0 if torch.equal(*results) and bool(results[0].any()) else math.inf


def repeat_checks(
    ops: TritonOps, device: torch.device, spans: Sequence[Span], runs: int, num_judged: int = 64
) -> Iterator[tuple[str, int]]:
    """(what, runs whose bits differ from the first): a race or a read of stale scratch shows here."""
    world = make_world(spans, 8, 2, 64, 64, torch.float16, device)
    logits, ids = torch.randn(num_judged, 5000, device=device), torch.arange(num_judged, device=device)
    x, router = torch.randn(9, 64, device=device).half(), Router(2, True)
    gate_up, down = (ExpertStack(torch.randn(6, *size, device=device).half()) for size in ((96, 64), (64, 48)))
    rules = filters_of([(0.0, 40, 0.9)] * num_judged)

    def truncated() -> Tensor:
        cut = logits.clone()
        ops.truncate(cut, rules)
        return cut

    calls: list[tuple[str, Callable[[], Tensor]]] = [
        ("attention", lambda: ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.125)),
        ("row_statistics", lambda: ops.row_statistics(logits, ids).entropy),
        ("sample", lambda: ops.sample(logits, ids, ids, ids, ids < 0)),
        ("truncate", truncated),
        ("moe", lambda: ops.moe(x, x[:, :6].float(), router, gate_up, down)),
    ]
    for name, call in calls:
        first = call()
        yield f"{runs} runs of {name}", sum(not torch.equal(call(), first) for _ in range(runs))
