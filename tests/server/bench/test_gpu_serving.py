"""The end-to-end part of the GPU report on a CPU: a tiny shape, our engine and transformers', clocks of the test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.bench import gpu_serving
from server.bench.gpu_loads import DecodeTimes, LoadError, OurEngine, bytes_per_token, mixed_load
from server.bench.gpu_serving import PLANS, Plan, decode_figures, measure, weights_read_bytes
from server.bench.transformers_peer import PeerError, TransformersPeer, _collect

CPU = torch.device("cpu")
SPEC = "hidden=32,layers=1,heads=4,kv_heads=2,mlp=48,vocab=100,max_len=256,on_device=1"
TINY = Plan("tiny", SPEC, (2,), 8, 3, 40, (16, 4, 3), 1.0)


class Ticks:
    """Each look at it is a second later."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def our_engine(kv_tokens: int = 512) -> OurEngine:
    return OurEngine(SPEC, "float32", "cpu", 3, 128, kv_tokens, Ticks())


def test_every_load_runs_on_both_engines_and_a_cpu_gives_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    result = measure([TINY], 1e6, CPU, Ticks(), path)
    assert json.loads(path.read_text()) == result
    found = result["shapes"]["tiny"]
    assert found["notes"] == [] == result["notes"]
    assert found["decode"] == [{"streams": 2, "steps": 3, "is_compared": True}]
    assert found["prefill"] == [{"streams": 1, "tokens": 40, "is_compared": True}]
    assert found["mixed"][0]["streams"] == 3
    assert found["engine"]["device"] == "cpu"
    assert "copy_gb_s" not in result


def test_only_steps_in_which_all_streams_decode_are_counted() -> None:
    engine = our_engine()
    times = engine.decode(3, 9, 4)
    assert times.step_s == (1.0,) * 4
    assert all(0 <= host <= 1 for host in times.host_s)
    assert times.device_s is None
    assert times.gap is None
    assert engine.run(mixed_load((16, 4), 3)) >= 4, "a second a step"
    engine.close()


def test_a_pool_that_is_too_small_is_said() -> None:
    engine = our_engine(kv_tokens=160)
    with pytest.raises(LoadError, match="KV pool is too small"):
        engine.decode(3, 60, 30)
    engine.close()


def test_figures_by_hand() -> None:
    times = DecodeTimes((0.010, 0.008, 0.012), (0.001, 0.002, 0.001), device_s=0.009)
    found = decode_figures(32, times, 16_000_000_000, 4e12)
    # 16 GB at 4 TB/s are 4 ms.
    assert found["floor_ms"] == pytest.approx(4.0)
    assert found["floor_fraction"] == pytest.approx(0.4)
    assert found["step_ms"] == pytest.approx(10.0)
    assert found["tokens_per_s"] == pytest.approx(3200)
    assert found["host_ms"] == pytest.approx(1.0)
    assert found["gap"] == pytest.approx(0.1)
    assert decode_figures(1, replace(times, device_s=0.011), 1, 1.0)["gap"] == 0.0


def test_a_table_that_is_not_the_head_is_not_read() -> None:
    for tie, num_tables in (("1", 0), ("0", 1)):
        engine = OurEngine(f"{SPEC},tie={tie}", "float32", "cpu", 3, 64, 128, Ticks())
        assert weights_read_bytes(f"{SPEC},tie={tie}", engine.info) == engine.info.weight_bytes - num_tables * 12800
        engine.close()


def test_the_shapes_are_those_of_the_goals() -> None:
    small, large = PLANS
    assert (small.name, small.streams[0]) == ("0.6B", 32), "judged first"
    assert (large.name, large.streams[0]) == ("8B", 1)
    assert set(small.streams) == set(large.streams) == {1, 8, 32, 128}
    assert bytes_per_token(large.spec, "bfloat16") == 131_072
    # A load of 128 streams, and one prompt of 8k, fit into what both engines can hold at once.
    assert large.kv_tokens * 131_072 < 30e9
    assert large.max_len > large.prefill_len


def test_a_peer_that_fails_is_a_note_and_ours_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        def __init__(self, *_: Any) -> None: ...

        def decode_step_s(self, *_: Any) -> float:
            raise PeerError("gave 2 token times instead of 7")

        def run_s(self, *_: Any) -> float:
            return 1.0

        def close(self) -> None: ...

    monkeypatch.setattr(gpu_serving, "TransformersPeer", Peer)
    found = measure([TINY], 1e6, CPU, Ticks(), None)["shapes"]["tiny"]
    assert found["notes"] == ["transformers, decode 2: PeerError: gave 2 token times instead of 7"]
    assert found["decode"] == [{"streams": 2, "steps": 3}]
    assert found["prefill"][0]["is_compared"] is True


def test_without_transformers_ours_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> TransformersPeer:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(gpu_serving, "TransformersPeer", missing)
    found = measure([TINY], 1e6, CPU, Ticks(), None)["shapes"]["tiny"]
    assert found["notes"] == ["transformers: ModuleNotFoundError: No module named 'transformers'"]
    assert found["decode"] == [{"streams": 2, "steps": 3}]


def test_what_has_no_time_is_named() -> None:
    late = replace(TINY, name="late")
    result = measure([replace(TINY, until=0.5), late], 20.0, CPU, Ticks(), None, has_peer=False)
    first = result["shapes"]["tiny"]
    assert first["notes"] == ["out of time: prefill 40, mixed 3"]
    assert len(first["decode"]) == 1
    assert result["notes"] == ["late: out of time, not begun"]


def test_a_shape_that_cannot_be_built_is_a_note() -> None:
    result = measure([replace(TINY, spec="hidden=32")], 1e6, CPU, Ticks(), None)
    assert "must be given" in result["notes"][0]


def test_a_stream_that_ends_early_is_no_figure() -> None:
    class Manager:
        def get_result(self, timeout: float) -> Any:
            return type("Result", (), {"is_finished": lambda _: True, "error": None, "request_id": "a",
                                       "timestamps": [0.1, 0.2]})()  # fmt: skip

    with pytest.raises(PeerError, match="gave 2 token times instead of 3"):
        _collect(Manager(), {"a": 3})
