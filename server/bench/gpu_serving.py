"""Serving end to end on this machine's device, without HTTP: the last part of `python -m kernels.gpu_report`.

    python -m server.bench.gpu_serving --json out.json --seconds 200

A 0.6B and an 8B shape with random weights: decode at 1, 8, 32 and 128 streams, a prefill of 8k tokens, and streams of
mixed lengths, each load first on our engine and then on transformers' continuous batching, both with their memory held.
The file is rewritten after each load; what did not fit into the time or failed is a note in it. Needs torch, triton,
numpy, tokenizers, safetensors and tqdm; transformers for the peer. `--dry-run` runs tiny loads on a CPU and writes no
figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from kernels.gpu_report.budget import Budget, Section
from kernels.gpu_report.timing import CudaTimer, HostTimer, free_memory, measure_rates, reason
from server.bench.gpu_loads import Clock, DecodeTimes, Load, OurEngine, mixed_load
from server.bench.transformers_peer import TransformersPeer
from server.engine.config import EngineInfo
from server.models.loading import parse_spec

_SPARE = 64
"""Tokens of a sequence beyond those counted: steps that settle or are profiled, the rest of a page."""


@dataclass(frozen=True)
class Plan:
    """What is run for one shape.

    spec    as `--random-weights` takes it
    streams of the decode loads, the judged one first; each behind prompts of `prompt_len` tokens, for `num_steps` steps
    mixed   longest prompt, longest output, number of streams
    until   share of the whole time at which this shape ends
    """

    name: str
    spec: str
    streams: tuple[int, ...]
    prompt_len: int
    num_steps: int
    prefill_len: int
    mixed: tuple[int, int, int]
    until: float

    @property
    def max_len(self) -> int:
        """Longest sequence of any load, and some steps that are not counted."""
        return _SPARE + max(self.prompt_len + self.num_steps, self.prefill_len, self.mixed[0] + self.mixed[1])

    @property
    def kv_tokens(self) -> int:
        """Keys that the largest load holds at once."""
        decode = max(self.streams) * (self.prompt_len + self.num_steps + _SPARE)
        mixed = self.mixed[2] * (self.mixed[0] + self.mixed[1] + _SPARE)
        return max(decode, mixed, self.max_len + _SPARE)


_QWEN3 = "model_type=qwen3,hidden=1024,layers=28,heads=16,kv_heads=8,head_dim=128,mlp=3072,vocab=151936,tie=1"
_LLAMA = "model_type=llama,hidden=4096,layers=32,heads=32,kv_heads=8,mlp=14336,vocab=128256"
PLANS = (
    Plan("0.6B", f"{_QWEN3},max_len=16384,on_device=1", (32, 1, 8, 128), 512, 40, 8192, (2048, 128, 64), 0.45),
    Plan("8B", f"{_LLAMA},max_len=16384,on_device=1", (1, 32, 8, 128), 512, 40, 8192, (2048, 128, 64), 1.0),
)
_TINY = "hidden=32,layers=2,heads=4,kv_heads=2,mlp=64,vocab=200,max_len=256,on_device=1"
TINY_PLANS = (Plan("tiny", _TINY, (1, 3), 8, 4, 40, (24, 6, 3), 1.0),)


class Shape:
    """Measures one shape. Both engines are made at the first load that needs them; a peer that fails is a note."""

    def __init__(
        self, plan: Plan, dtype: str, device: torch.device, copy_bytes_per_s: float, clock: Clock, has_peer: bool = True
    ) -> None:
        self._plan, self._device, self._copy = plan, device, copy_bytes_per_s
        self._engine = OurEngine(
            plan.spec, dtype, device.type, max(*plan.streams, plan.mixed[2]), plan.max_len, plan.kv_tokens, clock
        )
        self.found: dict[str, Any] = {"engine": facts(self._engine.info), "decode": [], "prefill": [], "mixed": []}
        self.found["notes"] = self._notes = list[str]()
        self._peer: TransformersPeer | None = None
        if has_peer:
            self._attempt("transformers", lambda: self._make_peer(dtype))

    def close(self) -> None:
        self._engine.close()
        if self._peer is not None:
            self._peer.close()
        self._peer = None
        free_memory()

    def loads(self) -> list[tuple[str, Callable[[], None]]]:
        """By name, most wanted first."""
        plan = self._plan
        decodes = [(f"decode {n}", self._named(self._decode, n)) for n in plan.streams]
        prefill = Load(((plan.prefill_len, 1),))  # reads its prompt and writes a token
        mixed = mixed_load(plan.mixed[:2], plan.mixed[2])
        return [
            *decodes,
            (f"prefill {plan.prefill_len}", lambda: self._whole("prefill", prefill, plan.prefill_len, 3)),
            (f"mixed {plan.mixed[2]}", lambda: self._whole("mixed", mixed, total_tokens(mixed), 1)),
        ]

    def run(self, section: Section, written: Callable[[], None]) -> None:
        for name, load in section.each(self.loads(), lambda item: item[0]):
            self._attempt(name, load)
            written()
        if section.left_out:
            self._notes.append(f"out of time: {', '.join(section.left_out)}")

    def _named(self, call: Callable[[int], None], streams: int) -> Callable[[], None]:
        return lambda: call(streams)

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self._notes.append(f"{what}: {reason(error)}")
            free_memory()
            return False
        return True

    def _make_peer(self, dtype: str) -> None:
        self._peer = TransformersPeer(self._plan.spec, getattr(torch, dtype), self._device, self._plan.kv_tokens)

    def _decode(self, streams: int) -> None:
        plan = self._plan
        times = self._engine.decode(streams, plan.prompt_len, plan.num_steps)
        result = decode_figures(streams, times, weights_read_bytes(plan.spec, self._engine.info), self._copy)
        peer = self._peer
        if peer is not None:

            def compare() -> None:
                step_s = peer.decode_step_s(streams, plan.prompt_len, plan.num_steps)
                result.update(
                    transformers_step_ms=1e3 * step_s, transformers_over_ours=step_s / times.median_s, is_compared=True
                )

            self._attempt(f"transformers, decode {streams}", compare)
        self.found["decode"].append(result)

    def _whole(self, kind: str, load: Load, num_tokens: int, repeats: int) -> None:
        """Tokens over the time from the load's arrival to its end; median of the runs after a first one."""
        self._engine.run(load)
        seconds = statistics.median(self._engine.run(load) for _ in range(repeats))
        result = {"streams": len(load.streams), "tokens": num_tokens, "seconds": seconds}
        result["tokens_per_s"] = num_tokens / seconds
        peer = self._peer
        if peer is not None:

            def compare() -> None:
                peer.run_s(load)
                peer_s = statistics.median(peer.run_s(load) for _ in range(repeats))
                result.update(transformers_seconds=peer_s, transformers_over_ours=peer_s / seconds, is_compared=True)

            self._attempt(f"transformers, {kind}", compare)
        self.found[kind].append(result)


def decode_figures(streams: int, times: DecodeTimes, read_bytes: int, copy_bytes_per_s: float) -> dict[str, Any]:
    """As they stand in the file. floor: bytes of the weights that a step reads / copy rate; no step can be faster."""
    floor_s = read_bytes / copy_bytes_per_s
    return {
        "streams": streams,
        "steps": len(times.step_s),
        "step_ms": 1e3 * times.median_s,
        "spread": times.spread,
        "tokens_per_s": streams / times.median_s,
        "host_ms": 1e3 * statistics.median(times.host_s),
        "device_ms": None if times.device_s is None else 1e3 * times.device_s,
        "gap": times.gap,
        "floor_ms": 1e3 * floor_s,
        "floor_fraction": floor_s / times.median_s,
    }


def weights_read_bytes(spec: str, info: EngineInfo) -> int:
    """Of a decode step: all weights but an embedding table that is not the head as well (it gives a few rows)."""
    raw = parse_spec(spec)
    if raw["tie_word_embeddings"]:
        return info.weight_bytes
    itemsize = int(getattr(torch, info.dtype).itemsize)
    return info.weight_bytes - int(raw["vocab_size"]) * int(raw["hidden_size"]) * itemsize


def total_tokens(load: Load) -> int:
    return sum(prompt_len + output_len for prompt_len, output_len in load.streams)


def facts(info: EngineInfo) -> dict[str, Any]:
    """What the engine says of itself, as far as a table has room for it."""
    values = {field.name: getattr(info, field.name) for field in fields(info) if field.name not in ("pid", "model")}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}


def without_figures(found: dict[str, Any]) -> dict[str, Any]:
    """A dry run's result: which loads ran, with counts, and no time of a host that interprets nothing it measures."""
    kept = ("streams", "steps", "tokens", "is_compared")
    rows = {
        kind: [{name: row[name] for name in kept if name in row} for row in found[kind]]
        for kind in ("decode", "prefill", "mixed")
    }
    return {**found, **rows}


def measure(
    plans: Sequence[Plan], seconds: float, device: torch.device, clock: Clock, path: Path | None, has_peer: bool = True
) -> dict[str, Any]:
    """All shapes within the time; what is returned is what the file holds."""
    budget = Budget(seconds, clock)
    is_dry = device.type != "cuda"
    result: dict[str, Any] = {"dry_run": is_dry, "shapes": {}, "notes": []}
    rates = measure_rates(CudaTimer(), device) if not is_dry else measure_rates(HostTimer(clock), device, 4096, 32)
    if not is_dry:
        result["copy_gb_s"] = rates.copy_bytes_per_s / 1e9
    free_memory()
    for plan in plans:
        section = budget.section(plan.name, plan.until)
        if not section.fits(plan.name):
            result["notes"].append(f"{plan.name}: out of time, not begun")
            continue
        try:
            shape = Shape(plan, "float32" if is_dry else "bfloat16", device, rates.copy_bytes_per_s, clock, has_peer)
        except Exception as error:
            result["notes"].append(f"{plan.name}: {reason(error)}")
            continue

        def written(name: str = plan.name, shape: Shape = shape) -> None:
            result["shapes"][name] = without_figures(shape.found) if is_dry else shape.found
            _write(path, result)

        try:
            shape.run(section, written)
        finally:
            shape.close()
        written()
    _write(path, result)
    return result


def _write(path: Path | None, result: dict[str, Any]) -> None:
    """Whole or not at all: the time may end at any moment."""
    if path is not None:
        draft = path.with_name(path.name + ".new")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """0 = measured, as far as it goes; 2 = no device here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="the file to write; without one it is printed")
    parser.add_argument("--seconds", type=float, default=240.0, help="all the time there is (default: 240)")
    parser.add_argument("--shape", action="append", choices=[plan.name for plan in PLANS], help="only this; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="tiny loads on the CPU; no figures")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA device here; --dry-run goes through the loads on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    plans = TINY_PLANS if arguments.dry_run else [p for p in PLANS if p.name in (arguments.shape or [p.name])]
    if len(plans) == 1:
        plans = [replace(plans[0], until=1.0)]
    result = measure(plans, arguments.seconds, device, time.perf_counter, arguments.json)
    if arguments.json is None:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
