"""Sizing of the KV pool: what the user says, a share of what is free, never less than one request."""

from __future__ import annotations

import pytest
import torch

from kernels.reference import ReferenceOps
from server.worker import kv_pool
from server.worker.kv_pool import KVPool, available_bytes, page_bytes, size_pool
from tests.server.worker.tiny_model import TinyShape

CPU = torch.device("cpu")
GIB = 1 << 30


def size(
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    *,
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_seqs: int = 4,
    shape: TinyShape | None = None,
    kv_share: float = 1.0,
) -> tuple[int, int]:
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: free)
    chosen = shape or TinyShape(32, 8, 128, 8192)
    return size_pool(chosen, torch.bfloat16, 32, max_seqs, max_model_len, kv_cache_bytes, 0, kv_share)


def test_a_page_holds_keys_and_values_of_all_layers() -> None:
    assert page_bytes(TinyShape(32, 8, 128), 32, torch.bfloat16) == 2 * 32 * 8 * 128 * 32 * 2


def test_the_default_is_a_quarter_of_what_is_free_up_to_four_gib_and_to_what_is_of_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_page = page_bytes(TinyShape(32, 8, 128), 32, torch.bfloat16)
    assert size(monkeypatch, 8 * GIB) == (2 * GIB // per_page, 8192)
    assert size(monkeypatch, 64 * GIB) == (4 * GIB // per_page, 8192)
    assert size(monkeypatch, 64 * GIB, max_seqs=1, max_model_len=100) == (4, 100)


def test_a_share_of_what_is_free_leaves_the_rest_to_the_pools_of_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    per_page = page_bytes(TinyShape(32, 8, 128), 32, torch.bfloat16)
    assert size(monkeypatch, 8 * GIB, kv_share=0.25)[0] == GIB // 2 // per_page
    assert size(monkeypatch, 64 * GIB, kv_share=0.25)[0] == GIB // per_page
    assert size(monkeypatch, GIB, kv_cache_bytes=300 * per_page, kv_share=0.25)[0] == 300


def test_an_explicit_size_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    per_page = page_bytes(TinyShape(32, 8, 128), 32, torch.bfloat16)
    assert size(monkeypatch, GIB, kv_cache_bytes=300 * per_page + 5)[0] == 300


def test_the_models_own_length_is_cut_to_the_pool_but_a_length_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_page = page_bytes(TinyShape(32, 8, 128), 32, torch.bfloat16)
    assert size(monkeypatch, GIB, kv_cache_bytes=10 * per_page) == (10, 320)
    with pytest.raises(ValueError, match=r"needs 32 pages .* lower max_model_len to at most 320"):
        size(monkeypatch, GIB, kv_cache_bytes=10 * per_page, max_model_len=1000)
    with pytest.raises(ValueError, match="0 pages"):
        size(monkeypatch, GIB, kv_cache_bytes=7)
    with pytest.raises(ValueError, match="max_model_len is 9000, but the model's positions end at 8192"):
        size(monkeypatch, GIB, max_model_len=9000)


def test_the_memory_reported_free_is_of_this_machine() -> None:
    assert 1 << 20 < available_bytes() < 1 << 48


def test_a_poisoned_pool_holds_nothing_but_nan() -> None:
    pool = KVPool(ReferenceOps(), TinyShape(), 3, 8, torch.float32, CPU, poison=True)
    assert len(pool.layers) == 2
    assert all(bool(torch.isnan(pages).all()) for layer in pool.layers for pages in layer)
    assert pool.num_bytes == 3 * page_bytes(TinyShape(), 8, torch.float32)
