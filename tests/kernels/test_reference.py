"""The reference back end against definitions written out row by row in float64: it is the oracle of all others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference_attention
from kernels.ops import AttentionRows, Ops
from kernels.reference import INT4_GROUP, ReferenceOps, fake_quantize, gumbel_noise, philox
from kernels.routing import Router

CPU = torch.device("cpu")
Span = tuple[int, int, int, int]
"""(sequence, KV index of the first row, rows, mask_block)."""

DECODES = [(0, 16, 1, 1), (1, 0, 1, 1), (2, 31, 1, 1), (3, 15, 1, 1)]
MIXED = [(0, 0, 17, 1), (1, 40, 1, 1), (2, 8, 16, 8), (3, 5, 33, 1), (4, 0, 23, 1 << 30)]


class World:
    """Sequences of random keys in shuffled pages; what no row may read is NaN."""

    def __init__(
        self, ops: Ops, spans: Sequence[Span], heads: tuple[int, int], head_dim: int, page: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        num_q, num_kv = heads
        kv_lens = {seq: start + num_rows for seq, start, num_rows, _ in spans}
        most = max(-(-kv_len // page) for kv_len in kv_lens.values())
        num_pages = most * len(spans) + 2
        self.k_pages, self.v_pages = ops.allocate_kv(num_pages, page, num_kv, head_dim, dtype, CPU)
        self.k_pages.fill_(math.nan)
        self.v_pages.fill_(math.nan)
        free = torch.randperm(num_pages, generator=generator).tolist()
        table = torch.full((len(spans), most), -7)
        self.keys, self.values = [], []
        columns: list[list[Tensor]] = [[], [], [], []]
        for index, (seq, start, _, mask_block) in enumerate(spans):
            kv_len = kv_lens[seq]
            for logical in range(-(-kv_len // page)):
                table[index, logical] = free.pop()
            at = torch.arange(kv_len)
            k, v = torch.randn(2, kv_len, num_kv, head_dim, generator=generator).to(dtype)
            self.k_pages[table[index, at // page], :, at % page] = k
            self.v_pages[table[index, at // page], :, at % page] = v
            self.keys.append(k.double())
            self.values.append(v.double())
            position = torch.arange(start, kv_len)
            visible = ((position // mask_block + 1) * mask_block).clamp_max(kv_len)
            slots = table[index, position // page] * page + position % page
            for column, part in zip(columns, (torch.full_like(position, index), position, visible, slots), strict=True):
                column.append(part)
        row_seq, positions, visible, slots = (torch.cat(column) for column in columns)
        starts = torch.tensor([0, *(num_rows for _, _, num_rows, _ in spans)]).cumsum(0)
        self.rows = AttentionRows(table.int(), row_seq.int(), positions.int(), visible.int(), slots, starts.int())
        self.q = torch.randn(len(slots), num_q, head_dim, generator=generator).to(dtype)

    def expected(self, scale: float, window: int | None) -> Tensor:
        group = self.q.shape[1] // self.k_pages.shape[1]
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for row in range(len(self.q)):
            seq, position, visible = (int(t[row]) for t in (self.rows.row_seq, self.rows.positions, self.rows.visible))
            low = max(0, position - window + 1) if window else 0
            for head in range(self.q.shape[1]):
                keys = self.keys[seq][low:visible, head // group]
                weights = torch.softmax(keys @ self.q[row, head].double() * scale, dim=0)
                out[row, head] = weights @ self.values[seq][low:visible, head // group]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1), (4, 4)])
@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_attention_equals_its_definition(
    spans: list[Span], heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    ops = ReferenceOps()
    world = World(ops, spans, heads, 20, 16, dtype)
    actual = ops.paged_attention(world.q, world.k_pages, world.v_pages, world.rows, 0.3, window)
    assert actual.dtype == dtype
    # Sums are float32; the output is rounded once to the dtype (2^-9 and 2^-12 of values up to about 4).
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    assert (actual.double() - world.expected(0.3, window)).abs().max() <= tolerance


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_attention_does_not_depend_on_page_size_or_tiling(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_attention, "TILE_ROWS", 5)
    monkeypatch.setattr(reference_attention, "MAX_SCORES", 600)
    ops = ReferenceOps()
    world = World(ops, MIXED, (6, 2), 16, page, torch.float32)
    actual = ops.paged_attention(world.q, world.k_pages, world.v_pages, world.rows, 0.25)
    assert (actual.double() - world.expected(0.25, None)).abs().max() <= 1e-5


def test_a_nan_query_spoils_its_own_row_only() -> None:
    ops = ReferenceOps()
    world = World(ops, DECODES, (2, 1), 8, 16, torch.float32)
    world.q[1] = math.nan
    actual = ops.paged_attention(world.q, world.k_pages, world.v_pages, world.rows, 1.0)
    assert actual[1].isnan().all()
    assert not actual[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write_splits_normalises_rotates_and_stores(normed: bool, rotary_dim: int) -> None:
    ops = ReferenceOps()
    num_q, num_kv, head_dim, page = 4, 2, 8, 4
    rows = AttentionRows(
        page_table=torch.tensor([[2, 0]], dtype=torch.int32),
        row_seq=torch.zeros(3, dtype=torch.int32),
        positions=torch.tensor([3, 4, 5], dtype=torch.int32),
        visible=torch.tensor([4, 5, 6], dtype=torch.int32),
        slots=torch.tensor([2 * page + 3, 0, 1]),
        span_starts=torch.tensor([0, 3], dtype=torch.int32),
    )
    qkv = torch.randn(3, (num_q + 2 * num_kv) * head_dim)
    angles = torch.outer(torch.arange(10.0), torch.rand(rotary_dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    norms = [torch.rand(head_dim) + 0.5 if normed else None for _ in range(2)]
    k_pages, v_pages = ops.allocate_kv(3, page, num_kv, head_dim, torch.float32, CPU)
    k_pages.fill_(math.nan)
    v_pages.fill_(math.nan)
    q = ops.qkv_rope_write(qkv, num_q, num_kv, head_dim, cos_sin, norms[0], norms[1], 1e-6, k_pages, v_pages, rows)

    def turned(head: Tensor, position: int, norm: Tensor | None) -> Tensor:
        x = head.double()
        if norm is not None:
            x = x / (x.square().mean() + 1e-6).sqrt() * norm.double()
        pairs = torch.complex(x[: rotary_dim // 2], x[rotary_dim // 2 : rotary_dim])
        pairs = pairs * torch.polar(torch.ones(rotary_dim // 2).double(), angles[position].double())
        return torch.cat((pairs.real, pairs.imag, x[rotary_dim:]))

    heads = qkv.view(3, -1, head_dim)
    for row, (position, slot) in enumerate(zip([3, 4, 5], rows.slots.tolist(), strict=True)):
        for head in range(num_q):
            assert torch.allclose(q[row, head].double(), turned(heads[row, head], position, norms[0]), atol=1e-5)
        for head in range(num_kv):
            stored = k_pages[slot // page, head, slot % page].double()
            assert torch.allclose(stored, turned(heads[row, num_q + head], position, norms[1]), atol=1e-5)
            assert torch.equal(v_pages[slot // page, head, slot % page], heads[row, num_q + num_kv + head])
    assert int(k_pages.isnan().any(-1).sum()) == 3 * page * num_kv - 3 * num_kv, "nothing else was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_adds_bias_and_residual(bias: bool, dtype: torch.dtype) -> None:
    ops = ReferenceOps()
    x, w, b, r = (torch.randn(*s).to(dtype) for s in ((5, 24), (11, 24), (11,), (5, 11)))
    packed = ops.pack_linear(w, b if bias else None)
    expected = x.double() @ w.double().T + (b.double() if bias else 0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    assert (packed.out_features, packed.in_features) == (11, 24)
    assert packed.num_bytes == (11 * 24 + (11 if bias else 0)) * dtype.itemsize
    assert (ops.linear(x, packed).double() - expected).abs().max() <= tolerance
    assert (ops.linear(x, packed, r).double() - expected - r.double()).abs().max() <= tolerance


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16() -> None:
    ops = ReferenceOps()
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(9000, 64).bfloat16()
    logits = ops.logits(x, ops.pack_linear(w))
    assert logits.dtype == torch.float32
    assert (logits.double() - x.double() @ w.double().T).abs().max() < 1e-4


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_experts_are_weighed_by_the_router(norm_topk_prob: bool) -> None:
    ops = ReferenceOps()
    x, logits = torch.randn(7, 12), torch.randn(7, 5)
    router = Router(2, norm_topk_prob)
    up, down = torch.randn(5, 16, 12), torch.randn(5, 12, 8)
    actual = ops.moe(x, logits, router, [ops.pack_linear(w) for w in up], [ops.pack_linear(w) for w in down])
    for row in range(7):
        weights = torch.softmax(logits[row].double(), 0)
        best = sorted(range(5), key=lambda e: -float(weights[e]))[:2]
        total = sum(float(weights[e]) for e in best) if norm_topk_prob else 1.0
        expected = torch.zeros(12).double()
        for e in best:
            gate, value = (up[e].double() @ x[row].double()).chunk(2)
            expected += weights[e] / total * (down[e].double() @ (gate * torch.sigmoid(gate) * value))
        assert torch.allclose(actual[row].double(), expected, atol=1e-4)


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32, 10 rounds)."""

    def words(counter: Sequence[int], key: Sequence[int]) -> list[int]:
        c = [torch.tensor([[word]]) for word in counter]
        return [int(word) for word in philox(c, (torch.tensor([[key[0]]]), torch.tensor([[key[1]]])))]

    ones = 0xFFFFFFFF
    assert words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert words(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_is_a_function_of_seed_sample_position_and_token_alone() -> None:
    key = [torch.tensor([value]) for value in (-(1 << 62) + 5, 2, 77)]
    alone = gumbel_noise(41, *key)
    crowd = gumbel_noise(97, *(torch.cat((torch.tensor([3]), value)) for value in key))
    assert torch.equal(alone[0], crowd[1, :41])
    for changed in range(3):
        other = [value + (changed == i) for i, value in enumerate(key)]
        assert not torch.equal(gumbel_noise(41, *other), alone)
    high_bit = [key[0] ^ (1 << 40), *key[1:]]
    assert not torch.equal(gumbel_noise(41, *high_bit), alone), "all 64 bits of the seed count"


def test_noise_has_the_gumbel_law() -> None:
    noise = gumbel_noise(200_000, *(torch.tensor([value]) for value in (11, 0, 0)))[0].double()
    assert torch.isfinite(noise).all()
    for x in (-1.0, 0.0, 1.0, 3.0):  # cdf exp(-exp(-x)); 5 sigma of 200,000 draws is at most 0.0056
        assert abs(float((noise <= x).double().mean()) - math.exp(-math.exp(-x))) < 0.0056


def test_sampling_follows_the_softmax_and_greedy_rows_take_the_best() -> None:
    ops, draws = ReferenceOps(), 20_000
    logits = torch.tensor([1.0, 2.0, -math.inf, 0.0, 2.0]).expand(draws, -1)
    index = torch.arange(draws)
    drawn = ops.sample(logits, index, torch.zeros_like(index), index % 7, torch.zeros(draws, dtype=torch.bool))
    shares = torch.bincount(drawn, minlength=5) / draws
    assert shares[2] == 0
    assert (shares - torch.softmax(logits[0], 0)).abs().max() < 0.018
    greedy = torch.tensor([True, False] * 2)
    four = ops.sample(logits[:4], index[:4], index[:4], index[:4], greedy)
    assert four[0] == four[2] == 1, "of equal logits, the lowest id"
    assert torch.equal(four[1], ops.sample(logits[1:2], index[1:2], index[1:2], index[1:2], greedy[1:2])[0])


@pytest.mark.parametrize("num_in", [INT4_GROUP, 3 * INT4_GROUP, 50])
def test_quantised_weights_lie_on_their_grid(num_in: int) -> None:
    weight = torch.randn(6, num_in)
    by_row = fake_quantize(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert (by_row - weight).abs().le(step / 2 + 1e-6).all()
    assert torch.allclose(by_row / step, (by_row / step).round(), atol=1e-3)
    for start in range(0, num_in, INT4_GROUP):
        group, rounded = (w[:, start : start + INT4_GROUP] for w in (weight, fake_quantize(weight, "int4")))
        step = group.abs().amax(1, keepdim=True) / 7
        assert (rounded - group).abs().le(step / 2 + 1e-6).all()
        assert torch.allclose(rounded / step, (rounded / step).round(), atol=1e-4)
    assert fake_quantize(torch.zeros(2, num_in), "int4").eq(0).all()


def test_an_unknown_quantisation_and_a_foreign_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="'int3'; supported are 'int8' and 'int4'"):
        ReferenceOps("int3")

    class Foreign:
        out_features = in_features = num_bytes = 4

    with pytest.raises(TypeError, match="another back end"):
        ReferenceOps().linear(torch.ones(1, 4), Foreign())
