"""Experts in the interpreter: the sort by its definition, sums against float64, the stack against single weights."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import ReferenceOps, fake_quantize
from kernels.routing import Router
from kernels.triton import moe
from kernels.triton.gpu_twins import experts_error
from kernels.triton.moe import ExpertStack, expert_tiles, grouped_product, max_tiles, sort_pairs
from kernels.triton.ops import TritonOps
from kernels.triton.tiles import next_power_of_two
from tests.kernels.triton.worlds import poisoned

FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stacks(num_experts: int, hidden: int, middle: int, dtype: torch.dtype) -> tuple[ExpertStack, ExpertStack]:
    gate_up = random(num_experts, 2 * middle, hidden, dtype=dtype, seed=1) * float(hidden**-0.5)
    return ExpertStack(gate_up), ExpertStack(random(num_experts, hidden, middle, dtype=dtype, seed=2))


def check(x: Tensor, logits: Tensor, router: Router, gate_up: ExpertStack, down: ExpertStack) -> None:
    with poisoned():
        actual = TritonOps(num_programs=1).moe(x, logits, router, gate_up, down)
    assert actual.dtype == x.dtype
    assert experts_error(actual, x, logits, router, gate_up, down) <= 1


@FEW
@given(
    st.sampled_from([0, 1, 2, 7, 16, 17, 40]),
    st.sampled_from([(1, 1), (2, 1), (5, 2), (6, 6), (9, 3)]),
    st.sampled_from([(16, 16), (33, 20), (130, 40)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 1.0, 30.0]),
)
def test_random_mixtures_equal_their_definition(
    num_rows: int, experts: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, skew: float
) -> None:
    """skew: how much more likely the later experts are, so that some get every row and some none."""
    num_experts, top_k = experts
    logits = random(num_rows, num_experts, seed=3) + skew * torch.arange(num_experts)
    check(random(num_rows, sizes[0], dtype=dtype), logits, Router(top_k, True), *stacks(num_experts, *sizes, dtype))


def test_groups_and_a_biased_choice_are_the_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_SUM_BLOCK", 16)
    router = Router(3, True, True, random(6, seed=4), 3, 2, 2.5)
    check(random(9, 48), random(9, 6, seed=5), router, *stacks(6, 48, 16, torch.float32))


def test_tiles_that_walk_in_groups_cover_every_row_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """More row tiles than a group holds, a last group that is smaller, several columns and depths."""
    monkeypatch.setattr(moe, "_GROUP", 2)
    monkeypatch.setattr(moe, "expert_tiles", lambda *a: replace(expert_tiles(*a), rows=16, columns=32, depth=32))
    logits = torch.zeros(70, 3).scatter_(1, torch.arange(70)[:, None] % 3, 9.0)
    check(random(70, 40, dtype=torch.float16), logits, Router(1, True), *stacks(3, 40, 36, torch.float16))


@FEW
@given(st.lists(st.integers(0, 6), max_size=90), st.sampled_from([16, 64]), st.sampled_from([7, 8, 20]))
def test_pairs_are_sorted_into_tiles_of_one_expert(chosen: list[int], rows: int, num_experts: int) -> None:
    num_tiles = max_tiles(len(chosen), num_experts, rows)
    order = torch.full((num_tiles + 1, rows), -7, dtype=torch.int32)
    tile_expert = torch.full((num_tiles + 1,), -7, dtype=torch.int32)
    sort_pairs[(num_experts + 1,)](
        torch.tensor(chosen, dtype=torch.int64), order, tile_expert, len(chosen), num_tiles,
        E=num_experts, EP=next_power_of_two(num_experts), BM=rows, BLOCK=32,
    )  # fmt: skip
    expected, owners = [], []
    for expert in range(num_experts):
        pairs = [pair for pair, one in enumerate(chosen) if one == expert]
        for start in range(0, len(pairs), rows):
            tile = pairs[start : start + rows]
            expected.append(tile + [len(chosen)] * (rows - len(tile)))
            owners.append(expert)
    assert order[: len(expected)].tolist() == expected
    assert tile_expert.tolist() == owners + [-1] * (num_tiles - len(owners)) + [-7]
    assert (order[len(expected) :] == -7).all(), "nothing behind the tiles that are used"


@pytest.mark.parametrize("rows", [1, 16])
def test_no_choice_needs_more_tiles_than_are_there_and_one_needs_all(rows: int) -> None:
    for num_experts in range(1, 6):
        for num_pairs in range(1, 60):
            used = min(num_pairs, num_experts)
            left = num_pairs - used
            full = [left // rows * rows] + [0] * (used - 1)  # all that makes another tile goes to one expert
            most = sum(-(-(1 + more) // rows) for more in full)
            assert max_tiles(num_pairs, num_experts, rows) == most


def test_a_stack_past_two_to_the_31_elements_is_read_where_it_lies() -> None:
    """Memory is virtual until it is written: only the last expert's is there."""
    num_experts, width, depth = (1 << 31) // (64 * 32) + 2, 64, 32
    weights = torch.empty((num_experts, width, depth), dtype=torch.float16)
    weights[-1] = random(width, depth, dtype=torch.float16)
    x, out = random(1, depth, dtype=torch.float16), torch.empty(1, width, dtype=torch.float16)
    order = torch.tensor([[0] + [1] * 15], dtype=torch.int32)
    grouped_product[(1,)](
        x, weights, out, order, torch.tensor([num_experts - 1], dtype=torch.int32), 1, 1,
        SHARE=1, N=width, K=depth, GATED=False, BM=16, BN=64, BK=32, GROUP=8, STAGES=2, UPCAST=False,
    )  # fmt: skip
    torch.testing.assert_close(out.float(), x.float() @ weights[-1].float().T, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_stack_holds_each_weight_once_and_one_beside_it(quantization: str | None) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def weight_of(expert: int) -> Tensor:
        assert expert == len(alive)
        assert sum(one() is not None for one in alive) <= (1 if quantization is None else 0), "at most the last one"
        weight = random(6, 40, seed=expert)
        alive.append(weakref.ref(weight))
        return weight

    stack = TritonOps(quantization, num_programs=1).pack_experts(4, weight_of)
    assert not any(one() is not None for one in alive)
    assert stack.weight_ENK.is_contiguous()
    assert (len(stack), stack[0].out_features, stack[0].in_features) == (4, 6, 40)
    assert sum(expert.num_bytes for expert in stack) == stack.weight_ENK.nbytes
    for expert, packed in enumerate(stack):
        plain = random(6, 40, seed=expert)
        assert torch.equal(packed.weight_NK, plain if quantization is None else fake_quantize(plain, quantization))
        assert packed.weight_NK.data_ptr() == stack.weight_ENK[expert].data_ptr()
    assert torch.equal(stack[1:3].weight_ENK, stack.weight_ENK[1:3])


def test_experts_packed_one_by_one_and_other_dtypes_are_refused() -> None:
    ops, twin = TritonOps(num_programs=1), ReferenceOps()
    gate_up, down = stacks(2, 16, 16, torch.float32)
    single = [twin.pack_linear(expert.weight_NK) for expert in gate_up]
    with pytest.raises(TypeError, match="packed by pack_experts"):
        ops.moe(random(1, 16), random(1, 2), Router(1, True), single, down)
    with pytest.raises(TypeError, match=r"x is torch\.float16, experts are torch\.float32"):
        ops.moe(random(1, 16).half(), random(1, 2), Router(1, True), gate_up, down)
