"""`--kv-cache-dtype` and `--deterministic`: a worker on narrow pages, what refuses them, and what they cost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling
from server.worker import build
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.kv_pool import KVPool, choose_kv_dtype, page_bytes
from tests.server.worker.tiny_model import Driver, TinyShape
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoint

CPU = torch.device("cpu")


def plain(*_: object, **__: object) -> Ops:
    return ReferenceOps()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_tokens_over_narrow_pages_are_the_same_alone_and_in_a_crowd(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "select_ops", plain)
    folder = write_tiny_checkpoint(tmp_path)
    config = WorkerConfig(
        str(folder), "float32", "cpu", kv_cache_dtype=name, kv_cache_bytes=1 << 20, num_threads=1,
        remember_profile=False,
    )  # fmt: skip
    prompts = [tuple((7 * i + j * j) % (VOCAB_SIZE - 4) + 4 for j in range(3 + 9 * i)) for i in range(5)]
    requests = [
        Request(str(i), prompt, max_tokens=12, sampling=Sampling(temperature=0)) for i, prompt in enumerate(prompts)
    ]
    with caplog.at_level(logging.WARNING):
        worker = build_worker(config, progress=False)
    assert "lossy" in caplog.text
    assert worker._pool.layers[0][0].dtype in (torch.int8, torch.float8_e4m3fn)
    together = Driver(worker).generate(requests)
    in_chunks = Driver(build_worker(config, progress=False), chunk=5)
    assert [in_chunks.generate([request])[0] for request in requests] == together
    assert len(set(map(tuple, together))) > 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_a_pools_size_counts_what_its_pages_hold(dtype: torch.dtype) -> None:
    pool = KVPool(ReferenceOps(), TinyShape(), 3, 8, dtype, CPU, poison=True)
    assert pool.num_bytes == 3 * page_bytes(TinyShape(), 8, dtype)


def test_a_back_end_that_cannot_hold_it_says_who_can() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int4'; expected auto, bfloat16"):
        choose_kv_dtype("int4", torch.float32, ReferenceOps())
    with pytest.raises(ValueError, match=r"holds the KV of a bfloat16 model as bfloat16 or fp8 or int8 only"):
        choose_kv_dtype("float32", torch.bfloat16, ReferenceOps())
    assert choose_kv_dtype("bfloat16", torch.float32, ReferenceOps()) == torch.bfloat16
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that the compiled kernels refuse narrow pages")
    ops = CpuOps(num_threads=1)
    assert choose_kv_dtype("auto", torch.float32, ops) == torch.float32
    for name in ("int8", "fp8", "bfloat16"):
        with pytest.raises(ValueError, match=r"as float32 only\. int8 is held on every CUDA device .* plain torch"):
            choose_kv_dtype(name, torch.float32, ops)


def test_the_deterministic_flag_keeps_onednn_out_of_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: shows that no product depends on the batch on CPUs with AMX")
    from kernels import select
    from kernels.cpu import ops as cpu_ops

    monkeypatch.setattr(cpu_ops, "cpu_flags", lambda: {"amx_tile", "amx_bf16"})
    for deterministic, rows in ((False, cpu_ops.AMX_ROWS), (True, None)):
        ops = select.select_ops("cpu", torch.bfloat16, num_threads=1, deterministic=deterministic)
        assert isinstance(ops, CpuOps)
        assert ops.onednn_rows == rows
