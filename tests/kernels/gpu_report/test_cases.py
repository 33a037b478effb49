"""Bytes, operations and floors of the cases, by hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("pip install triton: shows that the report's cases cost what they say", allow_module_level=True)

from kernels.gpu_report.cases import Case, Heads, Kind, all_cases, binary_tree, decode, num_seen, tiny_cases
from kernels.gpu_report.sparse_cases import (
    ChunkVariant,
    Reading,
    RowVariant,
    all_sparse_cases,
    tiny_sparse_cases,
    warm_cases,
)
from kernels.sparse import Method, least_budget
from kernels.sparse_prefill import PermutedBlocks, XAttention
from kernels.triton.gpu_checks import Span


def test_a_decode_reads_each_key_and_value_once() -> None:
    # 32 sequences x 2,048 keys x 8 heads x 128 elements x 2 bytes, keys and values.
    case = Case("", Kind.DECODE, decode(32, 2048))
    assert case.num_bytes == 32 * 2048 * 8 * 128 * 2 * 2 == 268_435_456
    # Each of 32 query heads: 2,048 keys x 128 elements x 2 products x 2 operations.
    assert case.num_flop == 32 * 32 * 2048 * 128 * 4 == 1_073_741_824
    # 268 MB at 4 TB/s are 67 us; 1.07 GFLOP at 800 TFLOP/s are 1.3 us.
    assert case.floor_s(4e12, 800e12) == pytest.approx(67.1e-6, rel=1e-3)


def test_smaller_elements_are_fewer_bytes_and_int8_has_scales() -> None:
    def num_bytes(dtype: torch.dtype) -> int:
        return Case("", Kind.DECODE, decode(1, 100), kv_dtype=dtype).num_bytes

    assert num_bytes(torch.float8_e4m3fn) == 2 * 8 * 100 * 128
    assert num_bytes(torch.int8) == 2 * 8 * 100 * (128 + 4)


def test_a_causal_prefill_is_half_a_square() -> None:
    case = Case("", Kind.PREFILL, (Span(8192, 8192),))
    # 2 N^2 D Q, and the diagonal.
    assert case.num_flop == 4 * 128 * 32 * (8192 * 8193 // 2)
    assert case.num_flop == pytest.approx(2 * 8192**2 * 128 * 32, rel=2e-4)
    # Bound by operations: 0.55 TFLOP at 800 TFLOP/s, while its 34 MB need 8 us.
    assert case.floor_s(4e12, 800e12) == pytest.approx(case.num_flop / 800e12)


def test_shared_keys_are_read_once() -> None:
    case = Case("", Kind.SHARED, decode(64, 8448), shared_keys=8192)
    assert case.num_bytes == 2 * 8 * 128 * 2 * (8192 + 64 * 256)


def test_rows_see_what_their_kind_of_span_lets_them() -> None:
    assert num_seen(Span(10, 4)) == 7 + 8 + 9 + 10
    assert num_seen(Span(10, 4, 4)) == sum(Span(10, 4, 4).seen(None).sum(1).tolist())
    tree = Span(10, 4, parents=binary_tree(4))  # depths 0, 1, 1, 2 behind 6 keys
    assert num_seen(tree) == 7 + 8 + 8 + 9 == int(tree.seen(None).sum())


def test_the_list_has_every_case_of_the_reference() -> None:
    plain = all_cases(())
    names = [case.label for case in plain]
    assert len(set(names)) == len(names)
    for batch in (1, 8, 32, 64, 128):
        for keys in (512, 2048, 8192, 32768, 131072):
            assert f"decode {batch} x {keys}" in names
    assert {(case.heads.group, case.heads.head_dim) for case in plain} >= {
        (1, 128),
        (4, 128),
        (8, 128),
        (1, 64),
        (4, 64),
    }
    assert {case.kind for case in plain} == set(Kind)
    assert {case.kind for case in tiny_cases()} == set(Kind), "the dry run goes through each kind"
    assert all(case.heads.num_q % case.heads.num_kv == 0 for case in plain)


def test_other_page_types_are_timed_where_the_back_end_declares_them() -> None:
    assert {case.kv_dtype for case in all_cases(())} == {torch.bfloat16}
    cases = [case for case in all_cases((torch.int8,)) if case.kv_dtype == torch.int8]
    assert len({(len(case.spans), case.spans[0].kv_len) for case in cases}) == len(cases) >= 4
    assert Case("decode", Kind.DECODE, decode(1, 9), Heads(32, 8, 64), torch.int8).label == "decode G4 D64 int8"


def test_sparse_decode_costs_its_ranking_and_its_budget() -> None:
    case = Case("", Kind.DECODE, decode(8, 32768))
    dense, one = case.num_bytes, 8 * 8 * 128 * 2  # a key of each of 8 sequences and 8 heads
    assert dense == 2 * 32768 * one
    follow = RowVariant(Reading.TIDAL_FOLLOW, 2048)
    assert follow.num_bytes(case) == dense // 16
    assert follow.num_flop(case) == case.num_flop // 16
    # Smallest and largest of 4,096 sub-pages of 8 keys: an eighth of keys and values.
    assert RowVariant(Reading.QUEST, 2048).num_bytes(case) == dense // 16 + dense // 8
    # Labels of 32 of 128 channels of keys alone: an eighth, too.
    assert RowVariant(Reading.DOUBLE_SPARSITY, 2048).num_bytes(case) == dense // 16 + dense // 8
    assert RowVariant(Reading.TIDAL_LIST, 2048).num_bytes(case) == dense
    assert RowVariant(Reading.TIDAL_LIST, 2048).num_flop(case) == case.num_flop


def test_a_sparse_chunk_costs_its_keys_once_and_its_share_of_keys_and_values() -> None:
    case = Case("", Kind.CHUNK, (Span(32768, 2048),))
    keys = case.num_bytes // 2
    for method in (XAttention(threshold=0.1), PermutedBlocks(threshold=0.1)):
        assert ChunkVariant(method).num_bytes(case) == round(1.2 * keys)
    # One product of 16 x 16, without the values'.
    assert ChunkVariant(XAttention(threshold=0.1)).num_flop(case) == round(case.num_flop * (0.1 + 1 / 32))
    probe = 2 * 128 * 32 * 128 * 32768
    assert ChunkVariant(PermutedBlocks(threshold=0.1)).num_flop(case) == round(0.1 * case.num_flop + probe)


def test_the_sparse_list_has_its_grid_and_every_method() -> None:
    cases = all_sparse_cases()
    assert len({case.label for case in cases}) == len(cases)
    rows = {(len(c.dense.spans), c.dense.spans[0].kv_len): c for c in cases if c.dense.kind == Kind.DECODE}
    assert rows.keys() == {(batch, keys) for batch in (1, 8, 32) for keys in (8192, 32768, 131072)}
    for (_, keys), case in rows.items():
        assert {(v.reading, v.budget) for v in case.variants if isinstance(v, RowVariant)} == {
            *((reading, keys // 16) for reading in Reading),
            *((reading, 1024) for reading in Reading if reading is not Reading.TIDAL_LIST),
        }
    chunks = [case for case in cases if case.dense.kind == Kind.CHUNK]
    assert {case.dense.spans[0].kv_len for case in chunks} == {8192, 32768, 131072}
    of_pages = (Reading.QUEST, Reading.DOUBLE_SPARSITY_PAGES)
    for case in [*cases, *tiny_sparse_cases(), *warm_cases()]:
        for variant in case.variants:
            if isinstance(variant, RowVariant):
                method = Method.QUEST if variant.reading in of_pages else Method.TIDAL
                assert least_budget(method, 64) <= variant.budget < case.dense.spans[0].kv_len
    assert {type(v) for case in tiny_sparse_cases() for v in case.variants} == {RowVariant, ChunkVariant}
