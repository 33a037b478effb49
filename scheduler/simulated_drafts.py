"""Speculation without a model: a drafter that is right as often as a request's own rate says, and what policies make
of it under load, on the published coefficients of an 8B-class model.

Run by `python -m scheduler.simulator --speculation` and `--bench-planner`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from scheduler.acceptance import Acceptance, RequestCounts
from scheduler.fake_worker import Known, Truth
from scheduler.goodput import Marginal, Outlook
from scheduler.hashing import mix
from scheduler.simulation import Arrival, Machine, Report, request_of, simulate
from scheduler.step_cost import StepCost
from scheduler.types import Drafts, Limits, SpeculationSettings, StepFeatures

# Speculative reference 3.4: max(5.2, .029 N) + .15 min(5.2, .029 N) + 4e-5 N_ctx + .9 ms.
_KNEE = 5.2 / 0.029
MACHINE_8B = Machine(
    curve=((0, 0.0061), (_KNEE, 0.00688), (4 * _KNEE, 0.02248)),
    key_s=4e-8,
    prefill_key_s=0.0,
    noise=0.03,
    outlier_rate=0.0,
)
LIMITS_8B = Limits(512, 256, 2048, 65536, 16, max_queued_requests=1 << 20, max_queued_tokens=1 << 40, tbt_slo_s=10.0)
PROMPT, OUTPUT = 800, 256
MACHINE_CPU = Machine(draft_s=6e-5)
STREAM_ALPHAS = {"wrong": (2.0, 60.0), "even": (8.0, 8.0), "right": (60.0, 4.0), "mixed": (1.2, 1.2)}
ALPHA = (1.2, 1.2)

SETTINGS: dict[str, SpeculationSettings | None] = {
    "k=0": None,
    "fixed 3": SpeculationSettings("fixed", 3),
    "fixed 5": SpeculationSettings("fixed", 5),
    "uniform": SpeculationSettings("uniform", 8),
    "myopic (w=0)": SpeculationSettings("marginal", 8, price=0.0),
    "marginal": SpeculationSettings("marginal", 8),
}


@dataclass(frozen=True, slots=True)
class ScriptedDrafter:
    """Each draft is right with the probability of its request, drawn from a Beta distribution by the request's seed.

    It claims the same for all: which requests are predictable must be learned.
    """

    alpha: tuple[float, float] = ALPHA
    claim: float = 0.5

    def __call__(self, known: Known, most: int, truth: Truth) -> Drafts | None:
        seed = known.request.sampling.seed
        rate = random.Random(seed).betavariate(*self.alpha)
        tokens = []
        for position, token in enumerate(truth(most), len(known.tokens)):
            is_right = mix(seed, position) / 2.0**64 < rate
            tokens.append(token if is_right else token + 1)
        return Drafts(tuple(tokens), tuple(self.claim ** (j + 1) for j in range(most)), "scripted")


def arrivals_8b(num_requests: int, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of 800-token prompts with outputs of 128 to 384 tokens."""
    rng = random.Random(seed)
    now, arrivals = 0.0, []
    for number in range(num_requests):
        now += rng.expovariate(rate)
        arrivals.append(Arrival(now, request_of(f"r{number}", PROMPT, rng.randint(OUTPUT // 2, 3 * OUTPUT // 2), rng)))
    return arrivals


def run(name: str, rate: float, num_requests: int, seed: int = 0) -> Report:
    """One policy of `SETTINGS` at one rate, in requests per second."""
    arrivals = arrivals_8b(num_requests, rate, seed)
    return simulate(LIMITS_8B, arrivals, MACHINE_8B, seed, speculation=SETTINGS[name], drafter=ScriptedDrafter())


def compare(rates: Iterable[float], num_requests: int, seed: int = 0) -> Iterable[str]:
    """Lines of a table: mean latency in seconds of every policy at every rate."""
    yield "mean latency s at " + "".join(f"{name:>14}" for name in SETTINGS)
    for rate in rates:
        reports = [run(name, rate, num_requests, seed) for name in SETTINGS]
        yield f"{rate:>12.0f} req/s " + "".join(f"{fmean(report.latency_s):14.2f}" for report in reports)


def stream(
    alpha: tuple[float, float], count: int, settings: SpeculationSettings | None, until_s: float = 3.0
) -> Report:
    """`count` streams that do not end, with acceptance rates from Beta(alpha), on the imagined 2-core machine."""
    rng = random.Random(0)
    arrivals = [Arrival(0.0, request_of(f"s{n}", 64, 3500, rng)) for n in range(count)]
    limits = Limits(2048, 64, 4096, 16384, 16)
    return simulate(limits, arrivals, MACHINE_CPU, 0, until_s, settings, ScriptedDrafter(alpha))


def compare_streams(counts: Iterable[int] = (1, 4, 8, 16, 32)) -> Iterable[str]:
    """Lines of a table: output of every policy over that of k = 0, for streams that never end."""
    policies = {"marginal": SpeculationSettings()} | {f"fixed {k}": SpeculationSettings("fixed", k) for k in (1, 3, 8)}
    yield f"{'drafts':>8} {'streams':>8} " + "".join(f"{name:>10}" for name in policies)
    for kind, alpha in STREAM_ALPHAS.items():
        for count in counts:
            plain = stream(alpha, count, None).output_tokens
            speeds = [stream(alpha, count, settings).output_tokens / plain for settings in policies.values()]
            yield f"{kind:>8} {count:>8} " + "".join(f"{speed:10.2f}" for speed in speeds)


def bench_planner(num_requests: int = 256, num_drafts: int = 8, repeats: int = 200) -> dict[str, float]:
    """Least CPU seconds to rate all offers of a step, to plan it, and to plan it while prompts wait."""
    rng = random.Random(0)
    cost = StepCost(MACHINE_8B.profile(rng))
    acceptance = Acceptance()
    offers, counts = [], []
    for _ in range(num_requests):
        claim = rng.betavariate(*ALPHA) * 0.9 + 0.05
        offers.append(Drafts((0,) * num_drafts, tuple(claim ** (j + 1) for j in range(num_drafts)), "scripted"))
        counts.append(RequestCounts())
    decodes = StepFeatures(num_requests, 0, num_requests, num_requests * 900)
    policy = Marginal(num_drafts)
    best = {"rate": 1.0, "plan": 1.0, "plan with a backlog": 1.0}
    for _ in range(repeats):
        begun = time.process_time()
        survivals = [acceptance.survivals(offer, count) for offer, count in zip(offers, counts, strict=True)]
        best["rate"] = min(best["rate"], time.process_time() - begun)
        for name, backlog in (("plan", 0), ("plan with a backlog", 5000)):
            begun = time.process_time()
            curve = cost.curve(decodes, 0)
            policy.allocate(survivals, Outlook(num_requests, 2048 - num_requests, backlog, 0.3, curve, 0.06, 16))
            best[name] = min(best[name], time.process_time() - begun)
    return best
