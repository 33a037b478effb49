"""K and V in host memory: what it takes of both memories, in which order keys travel, and what is refused at start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.cpu.build import find_compiler
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.reference import ReferenceOps
from scheduler.types import AttentionMethod
from server.models.loading import random_model
from server.worker import offloaded_layers
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import SpeculatorConfig
from server.worker.offload import NoStream, OffloadPlan
from server.worker.offload_checks import offload_check
from server.worker.sparse_config import SparseConfig
from server.worker.worker import Worker

LABELS, QUEST = AttentionMethod.DOUBLE_SPARSITY, AttentionMethod.QUEST
SHAPE = "hidden=64,layers=6,heads=4,kv_heads=2,head_dim=32,mlp=128,vocab=500,max_len=1024"
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="shows it for the compiled kernels")


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "channels.safetensors"
    save_file({"channels": torch.arange(32).to(torch.int16).repeat(6, 2, 1)}, path)
    return str(path)


def worker(channels: str, shape: str = SHAPE, **changes: Any) -> Worker:
    asked = {name: changes.pop(name) for name in ("methods", "offload", "offload_bytes") if name in changes}
    attention = replace(SparseConfig((LABELS,), (channels,), num_channels=4, offload=True), **asked)
    settings: dict[str, Any] = {
        "model": "nowhere", "random_weights": shape, "dtype": "float32", "device": "cpu", "num_threads": 1,
        "remember_profile": False, "page_size": 16, "kv_cache_bytes": 1 << 20, "attention": attention,
    }  # fmt: skip
    return build_worker(WorkerConfig(**(settings | changes)), progress=False)


def test_the_device_pays_for_labels_three_layers_and_a_buffer_and_the_host_for_the_rest(channels: str) -> None:
    built = worker(channels)
    keys = 2 * 16 * 4  # kv heads, tokens of a page, float32
    page, host_page = keys * (4 * 2 * 32 + 4 * 4), keys * 3 * 2 * 32
    assert built.info.num_pages == (1 << 20) // page
    assert built.info.kv_bytes == built.info.num_pages * page
    assert dict(built.info.memory)["KV pages on the host"] == built.info.num_pages * host_page
    here = worker(channels, offload=False)
    assert here.info.num_pages == (1 << 20) // (keys * (6 * 2 * 32 + 4 * 4))
    assert "KV pages on the host" not in dict(here.info.memory)


def test_the_hosts_limit_bounds_the_pages_and_must_hold_a_request(channels: str) -> None:
    host_page = 2 * 16 * 4 * 3 * 2 * 32
    built = worker(channels, offload_bytes=20 * host_page + 1)
    assert (built.info.num_pages, built.info.model_len) == (20, 20 * 16)
    assert dict(built.info.memory)["KV pages on the host"] == 20 * host_page
    with pytest.raises(ValueError, match=r"kv-offload-memory is 480.00 KiB = 20 pages .* 321 tokens needs 504.00 KiB"):
        worker(channels, offload_bytes=20 * host_page, max_model_len=321)
    with pytest.raises(ValueError, match=r"kv-offload-memory is 100 B = 0 pages"):
        worker(channels, offload_bytes=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": (LABELS, QUEST)}, "sparse-attention is double_sparsity,quest; name that method alone"),
        ({"shape": SHAPE.replace("layers=6", "layers=3")}, "of this model's 3 layers .* none is left"),
        ({"speculation": SpeculatorConfig(drafters=("suffix", "sparse_attention"))}, "drafters names sparse_attention"),
    ],
)
def test_what_does_not_go_with_it_is_said_at_start(channels: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worker(channels, **changes)


def test_a_back_end_that_cannot_fetch_is_refused() -> None:
    class Plain:
        name = "plain"

    model = random_model(SHAPE, ReferenceOps(), torch.float32, CPU)
    plain: Any = Plain()
    with pytest.raises(ValueError, match="the back end plain cannot fetch keys"):
        OffloadPlan(SparseConfig((LABELS,), offload=True), model.config, plain, ())


class LateStream(NoStream):
    """Copies when somebody waits for them, and no sooner."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def run(self, copy: Callable[[], None]) -> None:
        assert not self._waiting, "the buffer is one layer's"
        self._waiting.append(copy)

    def wait(self) -> None:
        for waiting in self._waiting:
            waiting()
        self._waiting.clear()


@pytest.mark.parametrize("stream", [NoStream, LateStream])
@pytest.mark.parametrize("make", [ReferenceOps, pytest.param(CpuOps, marks=needs_compiler)])
def test_random_steps_are_the_same_bits_as_over_pages_that_stay(
    make: type[Ops], stream: type[NoStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early or late the copies are made."""
    monkeypatch.setattr(offloaded_layers, "NoStream", stream)
    ops = make()
    what, is_right = offload_check(random_model(SHAPE, ops, torch.float32, CPU), ops, torch.float32, CPU, 12)
    assert is_right, what


def test_a_check_sees_keys_that_nobody_sent_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ReferenceOps()
    whole = ops.copy_keys
    monkeypatch.setattr(ops, "copy_keys", lambda source, target, places: whole(source, target, places[:-1]))
    what, is_right = offload_check(random_model(SHAPE, ops, torch.float32, CPU), ops, torch.float32, CPU, 6)
    assert not is_right, what


def test_layers_with_experts_are_fetched_for() -> None:
    ops = ReferenceOps()
    experts = random_model(f"{SHAPE},model_type=qwen3_moe,experts=4,top_k=2,expert_mlp=32", ops, torch.float32, CPU)
    what, is_right = offload_check(experts, ops, torch.float32, CPU, 6)
    assert is_right, what


def test_a_run_that_begins_on_the_host_is_foretold_by_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where layers with experts follow dense ones."""
    ops, queries = ReferenceOps(), list[Tensor]()
    choose = ops.choose_keys

    def noting(q_TQD: Tensor, *others: Any) -> Tensor:
        queries.append(q_TQD)
        return choose(q_TQD, *others)

    monkeypatch.setattr(ops, "choose_keys", noting)
    whole: Any = random_model(SHAPE, ops, torch.float32, CPU)
    cut = copy.copy(whole)
    cut._runs = [run.subset(part) for run in whole._runs for part in ([0, 1], [2, 3, 4, 5])]
    for model in (whole, cut):
        torch.manual_seed(0)  # of the keys before the steps
        what, is_right = offload_check(model, ops, torch.float32, CPU, 6)
        assert is_right, what
    assert len(queries) >= 2 * 2 * 3
    for mine, other in zip(queries[: len(queries) // 2], queries[len(queries) // 2 :], strict=True):
        assert torch.equal(mine, other)
