"""Checks of sparse attention that need no test library: for `kernels.gpu_report` on a GPU, and interpreted on any CPU.

What is chosen is compared exactly: the values are small integers, so every score is exact whatever the order of its
sum, and equal scores are common. What is read is then compared with the reference that reads a row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels import sparse_prefill
from kernels.ops import AttentionRows, Ops
from kernels.reference import ReferenceOps
from kernels.sparse import Method, Role, SparseLayer, SparseRows, least_budget
from kernels.sparse_keep import to_mass, top_k
from kernels.sparse_prefill import PermutedBlocks, XAttention
from kernels.triton.gpu_checks import Span, World, make_world
from kernels.triton.ops import TritonOps
from kernels.triton.paged import PagedAttention
from kernels.triton.sparse import permute, prefill
from kernels.triton.sparse.metadata import write_metadata
from kernels.triton.sparse.tile_mass import keep_tiles
from kernels.triton.sparse.top_k import select_top_k

SHAPES = [
    (8, 2, 128, 64, False),
    (8, 2, 128, 64, True),
    (7, 1, 64, 16, True),
    (6, 2, 80, 32, False),
    (4, 4, 256, 64, True),
]
"""Query heads, kv heads, head size, page size, whether labels are of 4 bits."""
LENGTHS = (2500, 1999, 1025, 1300, 640)
CHANNELS = 16
_CHOOSE = (Role.CHOOSE, Role.CHOOSE, Role.LIST, Role.CHOOSE)
_FOLLOW = (Role.CHOOSE, Role.CHOOSE, Role.FOLLOW, Role.CHOOSE)


def row_checks(ops: TritonOps, device: torch.device, lengths: Sequence[int] = LENGTHS) -> Iterator[tuple[str, float]]:
    """(what, worst error as a share of its bound): a step with rows of all methods and a dense one."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_q, num_kv, head_dim, page, int4_labels in SHAPES:
            world, layer = sparse_world(ops, lengths, num_q, num_kv, head_dim, page, dtype, device, int4_labels)
            rows = with_wishes(world.rows, num_kv, page)
            twin_rows = with_wishes(world.rows, num_kv, page)
            what = f"{dtype} Q{num_q} K{num_kv} D{head_dim} page {page}{', int4 labels' * int4_labels}"
            scale = 2.0 ** -(head_dim.bit_length() // 2)
            for roles, name in ((_CHOOSE, "choose"), (_FOLLOW, "follow")):
                of_layer = replace(layer, roles=roles)
                calls: list[tuple[Ops, AttentionRows]] = [(ops, rows), (ReferenceOps(), twin_rows)]
                actual, expected = (
                    back_end.paged_attention(world.q_TQD, world.k_pages, world.v_pages, its, scale, layer=of_layer)
                    for back_end, its in calls
                )
                yield f"sparse rows {name} {what}", _share(actual, expected, dtype)
                again = ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, rows, scale, layer=of_layer)
                yield f"sparse rows {name} again {what}", _equal(again, actual)
            yield f"lists {what}", _equal(_lists(rows), _lists(twin_rows))


def sparse_world(
    ops: TritonOps, lengths: Sequence[int], num_q: int, num_kv: int, head_dim: int, page: int, dtype: torch.dtype,
    device: torch.device, int4_labels: bool = False,
) -> tuple[World, SparseLayer]:  # fmt: skip
    """Decode rows over keys that are small integers, and the metadata that the kernels made of them."""
    world = make_world([Span(length, 1) for length in lengths], num_q, num_kv, head_dim, page, dtype, device)
    generator = torch.Generator().manual_seed(1)
    for tensor in (world.k_pages, world.q_TQD):
        whole = torch.randint(-2, 3, tensor.shape, generator=generator).to(device, dtype)
        tensor.copy_(torch.where(tensor.isnan(), tensor, whole))
    channels = torch.stack([torch.randperm(head_dim, generator=generator)[:CHANNELS] for _ in range(num_kv)])
    layer = ops.allocate_sparse(world.k_pages, _CHOOSE, True, channels.int().to(device), int4_labels)
    for metadata in (layer.bounds, layer.labels, layer.label_scales):
        if metadata is not None:
            metadata.fill_(math.nan if metadata.is_floating_point() else 255)
    write_metadata(world.k_pages, torch.cat([_slots(world, index) for index in range(len(lengths))]), layer)
    return world, layer


def _slots(world: World, index: int) -> Tensor:
    page = world.k_pages.shape[2]
    at = torch.arange(world.spans[index].kv_len, device=world.k_pages.device)
    return world.rows.page_table[index].long()[at // page] * page + at % page


def with_wishes(rows: AttentionRows, num_kv: int, page: int) -> AttentionRows:
    """The first rows are of one method each, the last one is dense."""
    device, num_rows = rows.visible.device, len(rows.visible)
    index = torch.arange(num_rows, device=device, dtype=torch.int32)
    index[-1] = -1
    methods = [Method(row % len(Method)) for row in range(num_rows - 1)]
    budgets = [least_budget(method, page) + 31 * row for row, method in enumerate(methods)]
    lists = torch.full((len(methods), num_kv, max(budgets)), -1, dtype=torch.int32, device=device)
    of_rows = torch.tensor([methods, budgets], dtype=torch.int32, device=device)
    return replace(rows, sparse=SparseRows(index, of_rows[0], of_rows[1], lists))


def _lists(rows: AttentionRows) -> Tensor:
    assert rows.sparse is not None
    assert rows.sparse.lists is not None
    return rows.sparse.lists


def _share(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Two roundings of weights and result, each of the dtype; values are normal, so errors scale with a few units."""
    unit = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-17}[dtype]
    error = (actual.double() - expected.double()).abs() / (unit * (expected.double().abs() + 1))
    return float(error.nan_to_num(math.inf).max())


def _equal(actual: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(actual, expected) else math.inf


def keep_checks(device: torch.device, width: int = 150_000) -> Iterator[tuple[str, float]]:
    """(what, 0 or infinity): lists against their twins, integer for integer, long rows cut among programs too."""
    generator = torch.Generator().manual_seed(2)
    for name, spread in (("few values", 3.0), ("many values", 3000.0)):
        for keys in (2000, width):
            visible, budgets = [keys, keys // 2, 900], [keys // 16, 70, 900]
            scores = (torch.randn(3, 2, keys, generator=generator) * spread).round().half().to(device)
            first, late = [4, 4, 900], [keys - 64, keys // 2 - 64, 900]
            counts = [torch.tensor(part, device=device) for part in (visible, budgets, first, late)]
            expected = top_k(scores, *counts).int()
            table = torch.arange(3 * -(-keys // 64), device=device, dtype=torch.int32).view(3, -1)
            rows = torch.arange(3, device=device, dtype=torch.int32)
            ids, indices = (torch.full_like(expected, -1) for _ in range(2))
            select_top_k(scores, table, rows, counts[0].int(), counts[1].int(), ids, indices, 64, False, 4, 64)
            yield f"top-k of {keys}, {name}", _equal(indices, expected)
    ranked = torch.tensor([1, 700, 1500], device=device, dtype=torch.int32)
    logits = torch.randn(2, 3, 1500, generator=generator).to(device) * 3
    mass = to_mass(logits.softmax(2))
    forced = torch.zeros((2, 3, 2), dtype=torch.int32, device=device)
    for threshold in (0.5, 0.9, 1.0):
        wanted = sparse_prefill.keep_tiles(mass, ranked, forced, threshold)
        tiles, lengths = keep_tiles(mass, ranked, forced, threshold)
        found = torch.zeros_like(wanted)
        for row in range(6):
            head, place = divmod(row, 3)
            found[head, place, tiles[head, place, : int(lengths[head, place])].long()] = True
        yield f"tiles of a share of {threshold}", _equal(found, wanted)


def prefill_checks(device: torch.device, num_keys: int = 3000) -> Iterator[tuple[str, float]]:
    """(what, worst error as a share of its bound): thresholds of 1 are dense; an order is a permutation of segments."""
    dense = ReferenceOps()
    for dtype in (torch.bfloat16, torch.float32):
        span = Span(num_keys, num_keys // 2 + 3)
        world = make_world([span], 8, 2, 128, 64, dtype, device)
        start, table = num_keys - span.num_rows, world.rows.page_table[0]
        expected = dense.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.09)
        chunk = (PagedAttention(1, 7), world.q_TQD, world.k_pages, world.v_pages, table, start)
        everything = prefill.x_attention(*chunk, XAttention(threshold=1.0), 0.09)
        yield f"x-attention of everything {dtype}", _share(everything, expected, dtype)
        everything = prefill.permuted_blocks(*chunk, PermutedBlocks(threshold=1.0), 0.09)
        yield f"permuted blocks of everything {dtype}", _share(everything, expected, dtype)
        num_sorted = num_keys // 256 * 256
        probe = world.q_TQD[-128:].contiguous()
        found = permute.importance(probe, world.k_pages, table, num_sorted, 0.09)
        wanted = sparse_prefill.importance(probe, _keys(world)[:num_sorted], 0.09)
        yield f"importance {dtype}", float(((found - wanted).abs() / (wanted * 2.0**-10 + 2.0**-30)).max())
        yield f"order {dtype}", _equal(permute.segment_order(found, 256), sparse_prefill.segment_order(found, 256))


def _keys(world: World) -> Tensor:
    slots, page = _slots(world, 0), world.k_pages.shape[2]
    return world.k_pages[slots // page, :, slots % page]


def host_checks(ops: TritonOps, device: torch.device, num_pages: int = 40) -> Iterator[tuple[str, float]]:
    """(what, 0 or infinity): keys fetched from pinned memory of the host, and brought back."""
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.bfloat16, torch.float32):
        shape = (num_pages, 2, 64, 80)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        there = (k.pin_memory(), v.pin_memory()) if device.type == "cuda" else (k.clone(), v.clone())
        here = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        places = torch.randperm(num_pages * 128, generator=generator)[: num_pages * 70].int()
        ops.copy_keys(there, here, places.to(device))
        wanted = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        for pages, others in zip((k, v), wanted, strict=True):
            others.view(-1, 80)[places] = pages.view(-1, 80)[places]
        yield f"keys of the host {dtype}", max(_equal(a.cpu(), b) for a, b in zip(here, wanted, strict=True))
        for pages in here:
            pages += 1
        ops.copy_keys(here, there, places[:100].to(device))
        back = [pages.cpu().view(-1, 80)[places[:100]] for pages in here]  # waits for the device
        brought = [pages.view(-1, 80)[places[:100]] for pages in there]
        yield f"keys brought back {dtype}", max(_equal(a, b) for a, b in zip(brought, back, strict=True))


def checks(ops: TritonOps, device: torch.device) -> Iterator[tuple[str, float]]:
    """All of them; 1 and less is right."""
    yield from row_checks(ops, device)
    yield from keep_checks(device)
    yield from host_checks(ops, device)
    yield from prefill_checks(device)
