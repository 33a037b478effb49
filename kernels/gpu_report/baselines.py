"""Attention of others on the same values: torch SDPA (flash, cuDNN), flex_attention over pages, our fixed split.

A baseline takes a problem and gives what runs it on one of its pools. What it cannot do it refuses with a reason, which
stands in the table; its result is compared with ours before it is timed. Contiguous keys are gathered beforehand, and
`gather` times that alone: SDPA is the upper line of a kernel that pays nothing for pages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kernels.gpu_report import installed
from kernels.gpu_report.problems import Baseline, Group, NotApplicableError, Prepared, Problem
from kernels.triton import fixed_split


def _contiguous(problem: Problem) -> list[tuple[Group, Tensor, list[tuple[Tensor, Tensor]]]]:
    """Each group's queries and, for each pool, its keys and values."""
    if problem.pools[0][0].dtype != problem.q_TQD.dtype:
        raise NotApplicableError(f"takes no {problem.pools[0][0].dtype} keys")
    return [
        (group, group.queries(), [(group.keys(k), group.keys(v)) for k, v in problem.pools])
        for group in problem.groups()
    ]


def _scattered(problem: Problem, groups: list[Group]) -> Callable[[list[Tensor]], Tensor]:
    def rows(outputs: list[Tensor]) -> Tensor:
        out_TQD = torch.empty_like(problem.q_TQD)
        for group, out in zip(groups, outputs, strict=True):
            out_TQD[group.row_ids()] = out.transpose(1, 2)
        return out_TQD

    return rows


def sdpa(backend: SDPBackend) -> Baseline:
    """torch's own, one call for all sequences of a shape."""

    def prepare(problem: Problem) -> Prepared:
        parts = _contiguous(problem)
        calls = [_sdpa_call(group, backend) for group, _, _ in parts]

        def run(pool: int) -> list[Tensor]:
            return [call(q, *kv[pool]) for call, (_, q, kv) in zip(calls, parts, strict=True)]

        return Prepared(run, _scattered(problem, [group for group, _, _ in parts]))

    return prepare


def _sdpa_call(group: Group, backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    span, scale = group.span, group.problem.scale
    if span.parents:
        raise NotApplicableError("takes no tree masks")
    sees_all = min(span.visible()) == span.kv_len
    if not sees_all and span.mask_block != 1:
        raise NotApplicableError("takes no masks of blocks")
    is_causal = not sees_all and span.num_rows == span.kv_len
    bias = None if sees_all or is_causal else causal_lower_right(span.num_rows, span.kv_len)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, bias, 0.0, is_causal, scale=scale, enable_gqa=True)

    return call


def gather(problem: Problem) -> Prepared:
    """What making pages contiguous costs; no attention."""
    groups = problem.groups()
    return Prepared(lambda pool: [group.keys(part) for group in groups for part in problem.pools[pool]], None)


def flex(problem: Problem) -> Prepared:
    """flex_attention, compiled, with a BlockMask over physical pages (its layout: all pages of a head side by side)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    groups = problem.groups()
    if len(groups) > 1:
        raise NotApplicableError("takes sequences of one shape only")
    group, page = groups[0], problem.pools[0][0].shape[2]
    if group.span.parents:
        raise NotApplicableError("takes no tree masks here")
    if problem.pools[0][0].dtype != problem.q_TQD.dtype:
        raise NotApplicableError(f"takes no {problem.pools[0][0].dtype} keys")
    q, page_ids, num_rows = group.queries(), group.page_ids(page), group.span.num_rows
    mask_mod = _page_mask(group, page_ids, page, len(problem.pools[0][0]))
    # A row of blocks for every 128 query rows: pages that all of its rows see whole, and those that the mask cuts.
    num_tiles, visible = -(-num_rows // 128), problem.rows.visible[group.row_ids()].long()
    ends = torch.arange(1, num_tiles + 1, device=q.device) * 128
    whole = visible[:, ends - 128] // page  # [N, tiles]
    seen = (visible[:, (ends - 1).clamp_max(num_rows - 1)] + page - 1) // page
    order = torch.arange(page_ids.shape[1], device=q.device)
    cut = (order + whole[..., None]).clamp_max(len(order) - 1)  # the pages after the whole ones come first
    every = page_ids[:, None].expand(-1, num_tiles, -1)
    lists = [seen - whole, every.gather(2, cut), whole, every]
    counts, indices, whole_counts, whole_indices = (part.to(torch.int32)[:, None].contiguous() for part in lists)
    num_keys = len(problem.pools[0][0]) * page
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, BLOCK_SIZE=(128, page), mask_mod=mask_mod,
        seq_lengths=(num_rows, num_keys), compute_q_blocks=False,
    )  # fmt: skip
    # Masked keys are multiplied by 0 there, so memory that nobody wrote must not be NaN.
    pools = [[part.transpose(0, 1).flatten(1, 2)[None].nan_to_num() for part in pool] for pool in problem.pools]
    # Interpreted kernels mean a dry run on a CPU, where compiling for it would only cost time.
    attend = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention

    def run(pool: int) -> list[Tensor]:
        k, v = pools[pool]
        return [attend(q, k, v, block_mask=block_mask, scale=problem.scale, enable_gqa=True)]

    return Prepared(run, _scattered(problem, groups))


def _page_mask(group: Group, page_ids: Tensor, page: int, num_pages: int) -> Callable[..., Tensor]:
    """A mask over physical keys: whose page it is, and whether the row sees that far in its own sequence."""
    device = page_ids.device
    logical = torch.full((len(page_ids), num_pages), 1 << 20, dtype=torch.int64, device=device)
    numbers = torch.arange(page_ids.shape[1], device=device).expand_as(page_ids)
    logical.scatter_(1, page_ids, numbers)
    visible = group.problem.rows.visible[group.row_ids()].long()  # [N, R]

    def mask(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return logical[batch, key // page] * page + key % page < visible[batch, row]

    return mask


def stand_in(settings: fixed_split.Settings) -> Baseline:
    """Our own plain kernel: every sequence cut into the same number of segments."""

    def prepare(problem: Problem) -> Prepared:
        if any(span.parents for span in problem.case.spans):
            raise NotApplicableError("takes no tree masks")
        if problem.pools[0][0].dtype != problem.q_TQD.dtype:
            raise NotApplicableError(f"takes no {problem.pools[0][0].dtype} keys")
        call = fixed_split.FixedSplit(problem.rows, problem.q_TQD, problem.pools[0][0], settings)
        return Prepared(lambda pool: call.run(problem.q_TQD, *problem.pools[pool], problem.scale), lambda out: out)

    return prepare


def _missing(package: str) -> Baseline:
    def prepare(problem: Problem) -> Prepared:
        raise NotApplicableError(f"{package} is not installed")

    return prepare


def _installed() -> dict[str, Baseline]:
    found: dict[str, Baseline] = {}
    for name, (package, baseline) in installed.PACKAGES.items():
        found[name] = baseline if importlib.util.find_spec(package) is not None else _missing(package)
    return found


def all_baselines() -> Mapping[str, Baseline]:
    """By the names that stand in the table."""
    return MappingProxyType(
        {
            "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "gather": gather,
            "flex": flex,
            "fixed split": stand_in(fixed_split.FIXED_SPLIT),
            "vllm-like": stand_in(fixed_split.VLLM_LIKE),
            **_installed(),
        }
    )
