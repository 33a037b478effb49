"""Labels of 4 bits, interpreted: the bits that are written are the twin's, and so are the scores and the choice."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.label_codes import decode, encode, num_bytes
from kernels.reference import ReferenceOps
from kernels.sparse import FIRST_KEYS, LAST_KEYS, Method, Role, SparseLayer
from kernels.triton.ops import TritonOps
from kernels.triton.sparse.label_codes import score_codes
from kernels.triton.sparse.metadata import write_metadata
from tests.kernels.cpu.worlds import Shape
from tests.kernels.test_sparse import SparseWorld, Wish
from tests.kernels.triton.sparse_worlds import Pool, guarded, unharmed

ROLES = (Role.DENSE, Role.CHOOSE, Role.DENSE, Role.CHOOSE)


def coded(pool: Pool, num_channels: int) -> SparseLayer:
    channels = torch.stack([torch.randperm(40)[:num_channels] for _ in range(2)]).int()
    codes = torch.full((*pool.k.shape[:3], num_bytes(num_channels)), 255, dtype=torch.uint8)
    scales = torch.full(pool.k.shape[:3], math.nan, dtype=torch.bfloat16)
    return SparseLayer(ROLES, None, codes, channels, scales)


@pytest.mark.parametrize(
    ("num_channels", "dtype"),
    [(5, torch.float32), (16, torch.bfloat16)]
    + [pytest.param(count, torch.float16, marks=pytest.mark.slow) for count in (1, 17, 32)],
)
def test_codes_of_keys_are_the_bits_of_the_twin_and_score_like_them(num_channels: int, dtype: torch.dtype) -> None:
    pool = Pool([70, 140], dtype=dtype)
    layer = coded(pool, num_channels)
    assert layer.labels is not None
    assert layer.label_scales is not None
    assert layer.channels is not None
    write_metadata(pool.k, pool.slots, layer)
    pages, offsets = pool.slots // 16, pool.slots % 16
    picked = layer.channels.long()
    codes, scales = encode(pool.k[pages, :, offsets].gather(2, picked.expand(len(pages), -1, -1)))
    assert torch.equal(layer.labels[pages, :, offsets], codes)
    assert torch.equal(layer.label_scales[pages, :, offsets], scales)
    assert int((~layer.label_scales.isnan()).sum()) == 2 * len(pages), "only the slots that were written"
    scores, whole = guarded(2, 2, 143, dtype=torch.float16)
    score_codes(
        pool.q, layer, pool.table, pool.row_seq, pool.visible, torch.tensor([70, 139]).int(), scores, 0.5, splits=3
    )
    assert unharmed(whole)
    assert scores[0].isnan().all(), "a row that reads all its keys is not scored"
    steps = decode(codes[70:], num_channels).double()
    of_query = pool.q[1].double().view(2, 3, -1).gather(2, picked[:, None].expand(-1, 3, -1))
    products = torch.einsum("kgc,nkc->kgn", of_query, steps)
    scale = scales[70:].double().T * 0.5
    wanted, mass = products.amax(1) * scale, torch.einsum("kgc,nkc->kgn", of_query.abs(), steps.abs()).amax(1) * scale
    bound = mass * 2.0**-18 + wanted.abs() * 2.0**-11 + 2.0**-24
    assert bool(((scores[1, :, :140].double() - wanted).abs() <= bound).all())


def test_a_step_chooses_by_codes_what_the_reference_chooses() -> None:
    shape, wish = Shape(num_q=4, num_kv=2, head_dim=16, page_size=4), FIRST_KEYS + LAST_KEYS + 3
    outs = []
    for ops in (ReferenceOps(), TritonOps(num_programs=2)):
        world = SparseWorld(ops, shape, [90], whole=True, int4_labels=True)
        twin = ReferenceOps()
        world.ops = twin
        world.write(world.rows({0: (0, 88)}, {}), {0: (0, 88)})
        world.ops = ops
        outs.append(world.sparse_step({0: (88, 90)}, {0: Wish(Method.DOUBLE_SPARSITY, wish)}))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
