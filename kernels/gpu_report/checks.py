"""What must hold before a time means anything: every kernel against float64 and its twin, the same bits in every run,
a graph's replay equal to the calls, and no compilation once warm. A check that raises is a failed one.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kernels.gpu_report.budget import Section
from kernels.gpu_report.results import Check
from kernels.gpu_report.timing import reason
from kernels.triton import gpu_checks
from kernels.triton.gpu_checks import Span
from kernels.triton.ops import TritonOps
from kernels.triton.sparse import gpu_checks as sparse_checks

REPEATS = 20
_WARM_STEPS, _STEPS = 100, 500


@dataclass(frozen=True)
class Effort:
    """How much is checked: all of it on a GPU; interpreted, the first `most_checks` of each family."""

    spans: Sequence[Span]
    vocab: int
    repeats: int
    num_judged: int
    is_gpu: bool
    most_checks: int | None = None


FULL = Effort(gpu_checks.MIXED, 151_936, REPEATS, 64, is_gpu=True)
DRY = Effort([Span(40, 1), Span(9, 9)], 300, 1, 1, is_gpu=False, most_checks=3)

Family = tuple[str, Callable[[], Iterator[tuple[str, float]]], float]
"""Name, what yields (check, figure), most that a figure may be."""


def families(ops: TritonOps, device: torch.device, effort: Effort) -> list[Family]:
    def counted(found: Iterator[tuple[str, int]]) -> Iterator[tuple[str, float]]:
        return ((what, float(count)) for what, count in found)

    found: list[Family] = [
        ("attention against float64", lambda: gpu_checks.attention_checks(ops, device, effort.spans), 1.0),
        ("kernels against their twins", lambda: gpu_checks.twin_checks(ops, device, effort.vocab), 1.0),
        ("the same bits", lambda: counted(_repeats(ops, device, effort)), 0.0),
    ]
    if effort.is_gpu:
        found.append(("sparse attention", lambda: sparse_checks.checks(ops, device), 1.0))
        found.append(("graphs", lambda: _replay_checks(ops, device, effort.spans), 0.0))
        found.append(("no compilation once warm", lambda: _compilation_checks(ops, device), 0.0))
    if effort.most_checks is None:
        return found
    return [(name, functools.partial(_first, make, effort.most_checks), most) for name, make, most in found]


def _repeats(ops: TritonOps, device: torch.device, effort: Effort) -> Iterator[tuple[str, int]]:
    return gpu_checks.repeat_checks(ops, device, effort.spans, effort.repeats, effort.num_judged)


def _first(make: Callable[[], Iterator[tuple[str, float]]], count: int) -> Iterator[tuple[str, float]]:
    return itertools.islice(make(), count)


def run_checks(found: Sequence[Family], section: Section, tell: Callable[[str], None]) -> Iterator[Check]:
    """Each check as it ends. What no longer fits is left out by the name of its family."""
    for family, make, most in found:
        if not section.fits(family):
            continue
        checks = []
        with section.item():
            for check in _family_checks(make, family, most):
                checks.append(check)
                yield check
        wrong = [check for check in checks if not check.is_right]
        worst = max((check.figure for check in checks if check.figure is not None), default=0.0)
        tell(f"{family}: {len(checks)} checks, {len(wrong)} wrong, worst {worst:.2f} (at most {most:g} is right)")
        for check in wrong:
            tell(f"WRONG {check.name}: {check.detail or check.figure}")


def _family_checks(make: Callable[[], Iterator[tuple[str, float]]], family: str, most: float) -> Iterator[Check]:
    last = "the start"
    try:
        for what, figure in make():
            last = what
            yield Check(what, figure <= most, figure)  # a NaN is wrong
    except Exception as error:
        yield Check(f"{family}, after {last}", False, None, reason(error))


def _replay_checks(ops: TritonOps, device: torch.device, spans: Sequence[Span]) -> Iterator[tuple[str, float]]:
    """Elements that differ between a CUDA graph's replay and the call it was made of."""
    for dtype in gpu_checks.DTYPES:
        world = gpu_checks.make_world(spans, 8, 2, 64, 64, dtype, device)

        def call(world: gpu_checks.World = world) -> torch.Tensor:
            return ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.125)

        expected = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = call()
        graph.replay()
        torch.cuda.synchronize()
        yield f"replay of attention {dtype}", float((replayed != expected).sum())


def _compilation_checks(ops: TritonOps, device: torch.device) -> Iterator[tuple[str, float]]:
    """Variants that random steps of attention compile after others have: lengths and batch sizes must cause none."""
    generator = random.Random(0)

    def step() -> None:
        spans = [
            Span(generator.randint(100, 700), generator.choice([1, 1, 1, 8, 16, 100]))
            for _ in range(generator.randint(1, 40))
        ]
        world = gpu_checks.make_world(spans, 4, 1, 64, 64, torch.bfloat16, device)
        ops.paged_attention(world.q_TQD, world.k_pages, world.v_pages, world.rows, 0.125)

    for _ in range(_WARM_STEPS):
        step()
    before = _num_variants()
    for _ in range(_STEPS):
        step()
    torch.cuda.synchronize()
    yield f"variants compiled in {_STEPS} random steps", float(_num_variants() - before)


def _num_variants() -> int:
    """Compiled so far, of every kernel in `kernels.triton`."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels.triton.")]
    values = [value for module in modules for value in vars(module).values()]
    kernels = {id(value): value for value in values if hasattr(value, "device_caches")}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())
