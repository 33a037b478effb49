"""`python -m server.bench.engine_alone`: what answers cost without HTTP and without a second process.

The tasks of `diffusion_work.py`, one at a time, denoised and token by token in turn in this process's engine:
milliseconds an answer, forwards of a denoised one, and the ratio. Beside `bench diffusion` it says what the way to the
engine adds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence

from scheduler.types import Speculation, SpeculationMode
from server.bench.diffusion_work import KINDS
from server.bench.speculation_work import Ask
from server.engine.offline import Completion, Engine

OFF = Speculation(SpeculationMode.OFF)


def timed(engine: Engine, ask: Ask, decoding: str | None) -> tuple[float, Completion]:
    """(milliseconds, answer). decoding: None = token by token."""
    started = time.perf_counter()
    (answer,) = engine.generate(
        [ask.prompt], max_tokens=ask.max_tokens, temperature=0.0, decoding=decoding, speculation=OFF
    )
    return 1e3 * (time.perf_counter() - started), answer


def measure(engine: Engine, kind: str, count: int, policy: str, seed: int) -> str:
    """A line about `count` tasks of a kind."""
    rng = random.Random(f"{seed} {kind}")
    plain, denoised, tokens, forwards = [], [], 0, 0
    for number in range(count + 5):
        ask = KINDS[kind][1](rng)
        ours, answer = timed(engine, ask, policy)
        base, _ = timed(engine, ask, None)
        if number < 5:
            continue
        denoised.append(ours)
        plain.append(base)
        tokens += len(answer.tokens)
        forwards += 0 if answer.decoding is None else answer.decoding.forwards
    ours, base = statistics.median(denoised), statistics.median(plain)
    return (
        f"{kind:<10} {tokens / count:5.1f} tokens, {forwards / count:4.1f} forwards; median {ours:5.1f} ms denoised, "
        f"{base:5.1f} token by token; {sum(plain) / sum(denoised):.2f} times as fast"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.bench.engine_alone", description=__doc__)
    parser.add_argument("--model", default="braid-tiny", help="embedded model or folder; must do both")
    parser.add_argument("--policy", default="auto", help="of the denoised answers")
    parser.add_argument("--count", type=int, default=100, help="tasks of a kind")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    args = parser.parse_args(argv)
    with Engine(args.model, progress=False) as engine:
        for kind in KINDS:
            print(measure(engine, kind, args.count, args.policy, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
