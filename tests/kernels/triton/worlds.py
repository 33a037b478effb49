"""Attention of a kernel against its definition in float64, with a bound for every element and poison around outputs.

The definition is `tests.kernels.test_trees.Piece.seen`: from positions and kinds of spans, not from the arrays that the
kernels read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps
from kernels.sparse import SparseLayer
from kernels.triton.paged import PagedAttention
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_trees import Piece, World

_GUARD = 64


class AttentionOps(ReferenceOps):
    """The kernels' attention; everything else, KV writes above all, in plain torch, which is faster here."""

    def __init__(self, num_programs: int) -> None:
        super().__init__()
        self.attention = PagedAttention(1, num_programs)

    def paged_attention(
        self,
        q_TQD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: AttentionRows,
        scale: float,
        window: int | None = None,
        layer: SparseLayer | None = None,
    ) -> Tensor:
        return self.attention.run(q_TQD, k_pages, v_pages, rows, scale, window)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and torch.empty_like give is NaN (or -7) between guards, which must stay as they are."""
    given: list[tuple[Tensor, int]] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count, kind = math.prod(shape), dtype or torch.get_default_dtype()
        whole = torch.full((count + 2 * _GUARD,), math.nan if kind.is_floating_point else -7, dtype=kind, device=device)
        whole[:_GUARD] = whole[-_GUARD:] = 42
        given.append((whole, count))
        return whole[_GUARD : _GUARD + count].view(shape)

    def empty_like(tensor: Tensor, **_: Any) -> Tensor:
        return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert given, "nothing was allocated: the guards saw nothing"
    for whole, _ in given:
        assert bool((whole[:_GUARD] == 42).all() and (whole[-_GUARD:] == 42).all()), "written past the end of a tensor"


def definition(world: World, window: int | None) -> tuple[Tensor, Tensor]:
    """(attention, sum over keys of weight times |value|), float64 [T, Q, D]: the second is what errors scale with."""
    s = world.shape
    out, mass = [], []
    for piece, qkv in zip(world.pieces, world.qkv, strict=True):
        heads = qkv.double().view(len(qkv), -1, s.head_dim)
        q, k, v = torch.split(heads, [s.num_q, s.num_kv, s.num_kv], dim=1)
        k, v = (part.repeat_interleave(s.num_q // s.num_kv, dim=1) for part in (k, v))
        scores = torch.einsum("rhd,khd->rhk", q[piece.start :], k) * s.head_dim**-0.5
        weights = scores.masked_fill(~piece.seen(window)[:, None], -math.inf).softmax(2)
        out.append(torch.einsum("rhk,khd->rhd", weights, v))
        mass.append(torch.einsum("rhk,khd->rhd", weights, v.abs()))
    return torch.cat(out), torch.cat(mass)


def errors_in_bounds(actual: Tensor, expected: Tensor, mass: Tensor, head_dim: int, most_score: float = 8.0) -> Tensor:
    """|actual - expected| as a share of what the arithmetic explains, per element: 1 and less is right.

    The weights are rounded to the values' dtype (relative u_p), the result to its own (u_out; the interpreter cuts
    bfloat16 off instead of rounding, so 2^-8), sums of head_dim products are float32, and a score's error, relative to
    its size, is an absolute error of its exponent.
    """
    u_p = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[actual.dtype]
    u_out = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[actual.dtype]
    u_sum = (head_dim + 64) * 2.0**-23 * max(1.0, most_score / 8)
    bound = 2 * (u_p * mass + u_out * expected.abs()) + u_sum * mass + 2.0**-24
    error = (actual.double() - expected).abs() / bound
    return error.where(~actual.isnan(), math.inf)


def check(
    pieces: Sequence[Piece], shape: Shape, window: int | None = None, num_programs: int = 3, values: str = "normal"
) -> Tensor:
    """Run one step of the pieces and hold every element to its bound; returns the attention [T, Q, D]."""
    world = World(AttentionOps(num_programs), shape, list(pieces))
    most_score = shape_values(world, values)
    with poisoned():
        actual = world.step(window)
    expected, mass = definition(world, window)
    worst = errors_in_bounds(actual, expected, mass, shape.head_dim, most_score)
    assert worst.max() <= 1, (
        f"{float(worst.max()):.1f} times the bound at {divmod(int(worst.argmax()), worst[0].numel())}"
    )
    return actual


def shape_values(world: World, values: str) -> float:
    """Change a world's random values to ones that make a kind of mistake visible; returns how large scores get."""
    s = world.shape
    for qkv in world.qkv:
        heads = qkv.view(len(qkv), -1, s.head_dim)
        q, k, v = torch.split(heads, [s.num_q, s.num_kv, s.num_kv], dim=1)
        if values == "one-hot":  # the output is the attention row: a wrong key cannot hide
            v.zero_()
            v[torch.arange(len(v)), :, torch.arange(len(v)) % s.head_dim] = 1
        elif values == "huge":  # scores of +-80: the running maximum must move
            k[::3] *= 20
        elif values == "equal":
            k[:] = k[:1].clone()
        elif values == "outlier":
            q[..., 0] *= 30
            k[..., 0] *= 3
    return 400.0 if values in ("huge", "outlier") else 8.0
