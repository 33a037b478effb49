"""`python -m server.bench.parallel.caches`: what each approximate cache of a bidirectional model costs and saves.

Runs the list tasks of the embedded model (server/embedded/canvases.py) through the engine in this process, once per
cache and once without one under the same selector and planner. A cache that shows the accuracy of its base line and
fewer rows has paid; forwards tell whether staler keys made the selector more careful. No times: rows are what a step's
time grows with, and unlike times they do not depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from scheduler.policies import make_diffusion
from scheduler.types import DecodingUsage, Diffusion, Topology
from server.embedded import tasks
from server.embedded.canvases import LENGTHS, TASKS
from server.engine.offline import Engine


class Setting(NamedTuple):
    """A cache under a selector and a planner. base: of the same selector and planner, without a cache."""

    cache: str
    selector: str = "threshold"
    planner: str = "fixed"
    values: tuple[tuple[str, float], ...] = ()

    @property
    def base(self) -> Setting:
        return Setting("none", self.selector, self.planner)

    @property
    def name(self) -> str:
        return ", ".join([self.cache, *(f"{key.rpartition('.')[2]} {value:g}" for key, value in self.values)])

    def diffusion(self, length: int) -> Diffusion:
        parts = {"selector": self.selector, "planner": self.planner, "cache": self.cache}
        return make_diffusion(
            "low_confidence", Topology.BIDIRECTIONAL, parts, dict(self.values), gen_length=length, block_size=8
        )


SETTINGS = (
    Setting("none"),
    Setting("prefix"),
    Setting("dual"),
    Setting("vicinity", values=(("margin", 4), ("warm_up", 1))),
    Setting("dkv_decode", values=(("refresh", 4),)),
    Setting("none", "low_confidence"),
    Setting("dual", "low_confidence"),
    Setting("dkv_decode", "low_confidence", values=(("refresh", 4),)),
    Setting("dkv_decode", "low_confidence", values=(("refresh", 8),)),
    Setting("none", "random"),
    Setting("dkv_greedy", "random"),
    Setting("dkv_greedy", "random", values=(("refresh", 4),)),
    Setting("none", planner="dsb"),
    Setting("dsb", planner="dsb", values=(("prefix", 8),)),
    Setting("none", planner="masks"),
    Setting("elastic", planner="masks", values=(("drift", 0.9),)),
    Setting("elastic", planner="masks", values=(("drift", 0.99),)),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Sums over all examples. num_same: answers with the tokens of the base line."""

    setting: Setting
    num_examples: int
    num_right: int
    num_same: int
    num_tokens: int
    usage: DecodingUsage

    def row(self) -> str:
        s, examples = self.setting, self.num_examples
        same = "" if s.cache == "none" else f"{self.num_same / examples:.0%}"
        return (
            f"| {s.selector}, {s.planner} | {s.name} | {self.num_right / examples:.0%} | {same} | "
            f"{self.usage.forwards / examples:.1f} | {self.usage.rows / examples:.0f} | "
            f"{self.usage.rows / max(1, self.num_tokens):.1f} |"
        )


def draw(samples: int, seed: int) -> list[tasks.Example]:
    """`samples` examples of each task, of another stream than training."""
    rng = random.Random(f"caches:{seed}")
    return [tasks.make_example(task, rng) for task in TASKS for _ in range(samples)]


def measure(
    engine: Engine, examples: Sequence[tasks.Example], settings: Sequence[Setting], length: int
) -> Iterator[Result]:
    """One result per setting. Base lines come before the settings that are compared with them."""
    answers: dict[Setting, list[tuple[int, ...]]] = {}
    for setting in settings:
        completions = engine.generate(
            [example.prompt for example in examples], length, decoding=setting.diffusion(length), seed=0
        )
        tokens = answers[setting] = [completion.tokens for completion in completions]
        right = sum(tasks.check(e, c.text) for e, c in zip(examples, completions, strict=True))
        same = sum(a == b for a, b in zip(tokens, answers[setting.base], strict=True))
        usage = sum((c.decoding or DecodingUsage() for c in completions), DecodingUsage())
        yield Result(setting, len(examples), right, same, sum(map(len, tokens)), usage)


def table(results: Sequence[Result]) -> str:
    """As Markdown. Rows per token count the prompt's: every step of a bidirectional model may compute them again."""
    head = "| selector, planner | cache | right | same text | forwards an answer | rows an answer | rows a token |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- |", *(result.row() for result in results)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m server.bench.parallel.caches", description=__doc__)
    parser.add_argument("--model", default="braid-tiny-bidirectional")
    parser.add_argument("--samples", type=int, default=20, help="examples a task")
    parser.add_argument("--length", type=int, choices=LENGTHS, default=max(LENGTHS), help="tokens of the canvas")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    examples = draw(args.samples, args.seed)
    with Engine(args.model, dtype="float32", max_seqs=16, max_queued_requests=len(examples)) as engine:
        bar = tqdm(measure(engine, examples, SETTINGS, args.length), total=len(SETTINGS), desc="caches")
        sys.stdout.write(table(list(bar)) + "\n")


if __name__ == "__main__":
    main()
