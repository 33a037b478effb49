"""What the start-up report says of memory."""

from __future__ import annotations

from dataclasses import replace

from scheduler.types import PromptAttention, PromptMethod
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


def test_what_prompts_may_leave_out_is_shown_where_they_may() -> None:
    info = FakeEngine(byte_tokenizer()).info
    offer = PromptAttention(PromptMethod.PBS)
    shown = banner(ServerConfig(), replace(info, prompt_attention=(offer,)), 80, ())
    assert "prompts   pbs, from token 4096 on; unless asked: dense" in shown
    info = replace(info, prompt_attention=(offer,), default_prompt_attention=offer)
    assert "unless asked: pbs, 0.9 kept: lossy, the text differs" in banner(ServerConfig(), info, 80, ())
