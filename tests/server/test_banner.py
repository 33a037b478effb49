"""What the start-up report says of memory."""

from __future__ import annotations

from dataclasses import replace

from server.banner import banner
from server.config import ServerConfig
from tests.server.api.fake_engine import FakeEngine, byte_tokenizer


def test_what_holds_a_gpus_memory_is_shown_and_a_cpu_shows_weights_and_pages_alone() -> None:
    info = FakeEngine(byte_tokenizer()).info
    cpu = banner(ServerConfig(), replace(info, memory=(("weights", 1), ("KV pages", 1))), 80, ())
    ledger = (("weights", 1), ("KV pages", 1), ("activations", 3 << 30), ("CUDA graphs", 1 << 29), ("other", 5))
    gpu = banner(ServerConfig(), replace(info, memory=ledger), 80, ())
    assert "          activations 3.0 GiB, CUDA graphs 512.0 MiB, other 5 B" in gpu.splitlines()
    assert len(gpu.splitlines()) == len(cpu.splitlines()) + 1
