"""`python -m kernels.gpu_report`: one call that proves and times the Triton kernels on this machine's GPU.

Checks every kernel (float64, plain-torch twins, repeats), counts compilations over random steps, and times attention as
a fraction of the copy rate and of the matrix rate measured in the same run, beside torch's own attention on the same
values (contiguous, without pages). Needs torch and triton only; at most nine minutes, and what did not fit is named.
Exit code 0 if all is right, 1 if a check failed, 2 without a GPU: then nothing is measured and nothing is claimed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kernels.triton.gpu_checks import Span
    from kernels.triton.ops import TritonOps

HEADS = (32, 8, 128)
PAGE = 64
ROUNDS = 20


@dataclass(frozen=True)
class Timing:
    """One case: medians over rounds, us; fraction of the floor max(bytes / copy rate, FLOP / matrix rate).

    spread  (third - first quartile) / median of ours; ratio  median over rounds of torch's time / ours
    """

    case: str
    us: float
    spread: float
    gb_s: float
    tflop_s: float
    floor_fraction: float
    sdpa_us: float | None
    ratio: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting new timings after this time")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if not torch.cuda.is_available():
        say("No CUDA device here: nothing was checked on a GPU and nothing measured.")
        say("Without one, `make test` interprets the kernels and compiles them for sm_80, sm_90 and sm_100.")
        return 2
    if importlib.util.find_spec("triton") is None:
        say("There is a CUDA device but no triton: pip install triton")
        return 2
    return report(arguments.json, deadline)


def report(json_path: Path | None, deadline: float) -> int:
    """All parts on the current device; returns the exit code."""
    from kernels.triton.ops import TritonOps

    device, ops = torch.device("cuda"), TritonOps()
    result: dict[str, object] = {"machine": machine()}
    say(json.dumps(result["machine"]))
    torch.manual_seed(0)
    failures = result["failures"] = check(ops, device)
    compilations = result["compilations_after_warm_up"] = new_compilations(ops, device)
    say(f"{compilations} compilations in 200 random steps after warm-up of 100 (0 is right)")
    copy_rate, matrix_rate = copy_bytes_per_s(), matrix_flop_per_s()
    result["copy_gb_s"], result["matrix_tflop_s"] = copy_rate / 1e9, matrix_rate / 1e12
    say(f"copy rate {copy_rate / 1e9:.0f} GB/s (read + write), bf16 matrix rate {matrix_rate / 1e12:.0f} TFLOP/s")
    say("case                                      us  spread    GB/s  TFLOP/s of floor   SDPA us SDPA/ours")
    timings, left_out = [], []
    for name, spans in cases():
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        timing = time_case(ops, name, spans, copy_rate, matrix_rate)
        timings.append(asdict(timing))
        sdpa = "        -         -" if timing.ratio is None else f"{timing.sdpa_us:9.1f} {timing.ratio:9.2f}"
        say(
            f"{name:34} {timing.us:9.1f} {timing.spread:7.1%} {timing.gb_s:7.0f} {timing.tflop_s:8.1f} "
            f"{timing.floor_fraction:8.2f} {sdpa}"
        )
        torch.cuda.empty_cache()
    result["timings"], result["left_out"] = timings, left_out
    if left_out:
        say(f"out of time, not measured: {', '.join(left_out)}")
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))
    return 1 if failures or compilations else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import triton

    device = torch.cuda.get_device_properties()
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def check(ops: TritonOps, device: torch.device) -> list[str]:
    """Every check of `gpu_checks`; prints the worst of each kind, returns what failed."""
    from kernels.triton import gpu_checks

    failures: list[str] = []
    for title, found in [
        ("attention against float64", gpu_checks.attention_checks(ops, device, gpu_checks.MIXED)),
        ("other kernels against their twins", gpu_checks.twin_checks(ops, device, 151_936)),
    ]:
        shares = dict(found)
        wrong = [f"{what}: {share:.2f} times its bound" for what, share in shares.items() if not share <= 1]
        say(f"{title}: {len(shares)} cases, worst {max(shares.values()):.2f} of its bound")
        failures += wrong
    for what, differing in gpu_checks.repeat_checks(ops, device, gpu_checks.MIXED, 20):
        say(f"{what}: {differing} differ")
        if differing:
            failures.append(f"{what}: {differing} differ")
    for failure in failures:
        say(f"WRONG {failure}")
    return failures


def new_compilations(ops: TritonOps, device: torch.device) -> int:
    """Attention variants that random steps compile after others have: lengths and batch sizes must cause none."""
    from kernels.triton import gpu_checks
    from kernels.triton.attention import attend
    from kernels.triton.merge import combine, merge_parts

    generator = random.Random(0)

    def step() -> None:
        spans = [
            gpu_checks.Span(generator.randint(100, 700), generator.choice([1, 1, 1, 8, 16, 100]))
            for _ in range(generator.randint(1, 40))
        ]
        world = gpu_checks.make_world(spans, 4, 1, 64, PAGE, torch.bfloat16, device)
        ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.125)

    def variants() -> int:
        return sum(
            len(cache[0]) for kernel in (attend, combine, merge_parts) for cache in kernel.device_caches.values()
        )

    for _ in range(100):
        step()
    before = variants()
    for _ in range(200):
        step()
    torch.cuda.synchronize()
    return variants() - before


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a large device copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds([lambda: target.copy_(source)], 5)[0])


def matrix_flop_per_s() -> float:
    """bfloat16 8192^3 on random values: zeros run faster."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192.0**3 / statistics.median(seconds([lambda: torch.mm(a, b)], 5)[0])


def seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Times of each call, interleaved over ROUNDS rounds, `repeats` runs of a CUDA graph each."""
    graphs = []
    for call in calls:
        call()  # compiles and plans: neither may happen inside a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 2):
        for times, graph in zip(found, graphs, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times.append(start.elapsed_time(end) / 1e3 / repeats)
    return found


def cases() -> list[tuple[str, list[Span]]]:
    """The cases of a step, most wanted first."""
    from kernels.triton.gpu_checks import Span

    found: list[tuple[str, list[Span]]] = []
    for batch, keys in [
        (32, 2048),
        (128, 2048),
        (32, 8192),
        (64, 4096),
        (1, 32768),
        (1, 131072),
        (8, 1024),
        (8, 32768),
    ]:
        found.append((f"decode {batch} x {keys}", [Span(keys, 1)] * batch))
    found.append(("decode 1 x 131072 + 31 x 4096", [Span(131072, 1)] + [Span(4096, 1)] * 31))
    for rows in (2, 4, 8):
        found.append((f"verify 32 x {rows} rows x 8192", [Span(8192, rows)] * 32))
    found.append(("denoise 32 x 32 rows x 8192", [Span(8192, 32, 32)] * 32))
    for keys in (2048, 8192, 32768):
        found.append((f"prefill {keys}", [Span(keys, keys)]))
    for prefix in (8192, 32768):
        found.append((f"chunk 2048 behind {prefix}", [Span(prefix + 2048, 2048)]))
    found.append(("decode 64 x 4096 + chunk 2048", [Span(4096, 1)] * 64 + [Span(2048, 2048)]))
    return found


def time_case(ops: TritonOps, name: str, spans: list[Span], copy_rate: float, matrix_rate: float) -> Timing:
    """Ours on as many copies of the KV as exceed three times the L2 cache; torch's on the same shape if it can."""
    from kernels.triton.gpu_checks import make_world

    num_q, num_kv, head_dim = HEADS
    num_bytes = 2 * 2 * num_kv * head_dim * sum(span.kv_len for span in spans)
    num_flop = 4 * head_dim * num_q * sum(sum(span.visible()) for span in spans)
    copies = max(1, min(8, -(-3 * torch.cuda.get_device_properties().L2_cache_size // num_bytes)))
    world = make_world(spans, num_q, num_kv, head_dim, PAGE, torch.bfloat16, torch.device("cuda"))
    pools = [(world.k_pages, world.v_pages)]
    pools += [(torch.randn_like(world.k_pages), torch.randn_like(world.v_pages)) for _ in range(copies - 1)]

    def ours() -> None:
        for k_pages, v_pages in pools:
            ops.paged_attention(world.q_TQD, k_pages, v_pages, world.rows, head_dim**-0.5)

    theirs = torch_attention(spans, copies)
    repeats = max(1, int(2e-3 / (copies * max(num_bytes / copy_rate, num_flop / matrix_rate))))
    times = seconds([ours] if theirs is None else [ours, theirs], min(50, repeats))
    mine = [elapsed / copies for elapsed in times[0]]
    median = statistics.median(mine)
    quartiles = statistics.quantiles(mine, n=4)
    sdpa = None if theirs is None else statistics.median(times[1]) / copies
    ratio = None if theirs is None else statistics.median(b / a for a, b in zip(*times, strict=True))
    return Timing(
        name,
        median * 1e6,
        (quartiles[2] - quartiles[0]) / median,
        num_bytes / median / 1e9,
        num_flop / median / 1e12,
        max(num_bytes / copy_rate, num_flop / matrix_rate) / median,
        None if sdpa is None else sdpa * 1e6,
        ratio,
    )


def torch_attention(spans: list[Span], copies: int) -> Callable[[], object] | None:
    """torch's attention over contiguous K and V, for equal decodes and for whole prefills; None for other steps."""
    span, (num_q, num_kv, head_dim) = spans[0], HEADS
    whole = span.num_rows == span.kv_len
    if any(other != span for other in spans) or not (whole or span.num_rows == 1):
        return None

    def random_heads(heads: int, length: int) -> Tensor:
        return torch.randn(len(spans), heads, length, head_dim, device="cuda", dtype=torch.bfloat16)

    q = random_heads(num_q, span.num_rows)
    kv = [(random_heads(num_kv, span.kv_len), random_heads(num_kv, span.kv_len)) for _ in range(copies)]

    def run() -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(q, k, v, is_causal=whole, enable_gqa=True)

    return run


if __name__ == "__main__":
    sys.exit(main())
