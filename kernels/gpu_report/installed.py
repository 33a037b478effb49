"""Baselines of packages that may be installed: FlashAttention 2 and 3, FlashInfer. Their documented calls, no more.

Each gets pages of the size it wants, with the same values. No machine of ours had them when this was written; a call
that fails leaves its reason in the table, and a result that differs from ours is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kernels.gpu_report.problems import Baseline, Group, NotApplicableError, Prepared, Problem

_FA2_PAGE = 256
"""FlashAttention 2 takes pages of a multiple of 256 keys."""


def _one_causal_group(problem: Problem) -> Group:
    groups = problem.groups()
    span = groups[0].span
    if len(groups) > 1:
        raise NotApplicableError("takes sequences of one shape here")
    if span.parents or (span.mask_block != 1 and span.num_rows > 1):
        raise NotApplicableError("takes causal rows only")
    if problem.pools[0][0].dtype != problem.q_TQD.dtype:
        raise NotApplicableError(f"takes no {problem.pools[0][0].dtype} keys here")
    return groups[0]


def _repaged(group: Group, page: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """int32 page table [N, pages] and, for each pool, pages [pages, page, K, D] with the group's keys."""
    num_pages = -(-group.span.kv_len // page)
    table = torch.arange(len(group.indices) * num_pages, dtype=torch.int32, device=group.device).view(-1, num_pages)

    def pages(pool: Tensor) -> Tensor:
        keys = group.keys(pool).transpose(1, 2)  # [N, L, K, D]
        padding = num_pages * page - keys.shape[1]
        padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, padding))
        return padded.reshape(-1, page, *keys.shape[2:]).contiguous()

    return table, [(pages(k), pages(v)) for k, v in group.problem.pools]


def _flash(problem: Problem, page: int, call: Callable[..., Any], table_name: str) -> Prepared:
    group = _one_causal_group(problem)
    table, pools = _repaged(group, page)
    q = group.queries().transpose(1, 2).contiguous()  # [N, R, Q, D]
    lengths = torch.full((len(group.indices),), group.span.kv_len, dtype=torch.int32, device=group.device)
    fixed = {"cache_seqlens": lengths, table_name: table, "causal": True, "softmax_scale": problem.scale}

    def rows(out: Any) -> Tensor:
        out_TQD = torch.empty_like(problem.q_TQD)
        out_TQD[group.row_ids()] = out[0] if isinstance(out, tuple) else out
        return out_TQD

    return Prepared(lambda pool: call(q, *pools[pool], **fixed), rows)


def flash_attention_2(problem: Problem) -> Prepared:
    from flash_attn import flash_attn_with_kvcache

    return _flash(problem, _FA2_PAGE, flash_attn_with_kvcache, "block_table")


def flash_attention_3(problem: Problem) -> Prepared:
    from flash_attn_interface import flash_attn_with_kvcache

    return _flash(problem, problem.pools[0][0].shape[2], flash_attn_with_kvcache, "page_table")


def flashinfer(problem: Problem) -> Prepared:
    """Its prefill wrapper serves every causal step; our pages are its "HND" layout."""
    import flashinfer as library

    if problem.rows.tree is not None or any(span.mask_block != 1 for span in problem.case.spans if span.num_rows > 1):
        raise NotApplicableError("takes causal rows only")
    if problem.pools[0][0].dtype != problem.q_TQD.dtype:
        raise NotApplicableError(f"takes no {problem.pools[0][0].dtype} keys here")
    device, heads = problem.q_TQD.device, problem.case.heads
    page = problem.pools[0][0].shape[2]
    lengths = torch.tensor([span.kv_len for span in problem.case.spans], dtype=torch.int32, device=device)
    counts = (lengths + page - 1) // page
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    indices = torch.cat([problem.rows.page_table[i, :count] for i, count in enumerate(counts.tolist())])
    last = (lengths - 1) % page + 1
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    kind = {"q_data_type": problem.q_TQD.dtype}
    if all(span.num_rows == 1 for span in problem.case.spans):
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=heads.group > 1)
        wrapper.plan(bounds, indices, last, heads.num_q, heads.num_kv, heads.head_dim, page, **kind)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        starts = problem.rows.span_starts
        wrapper.plan(
            starts, bounds, indices, last, heads.num_q, heads.num_kv, heads.head_dim, page, causal=True, **kind
        )  # fmt: skip
    return Prepared(lambda pool: wrapper.run(problem.q_TQD, problem.pools[pool]), lambda out: out)


PACKAGES: Mapping[str, tuple[str, Baseline]] = MappingProxyType(
    {
        "flash-attn 2": ("flash_attn", flash_attention_2),
        "flash-attn 3": ("flash_attn_interface", flash_attention_3),
        "flashinfer": ("flashinfer", flashinfer),
    }
)
"""Name in the table -> package that it needs, baseline."""
