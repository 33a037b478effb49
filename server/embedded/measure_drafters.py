"""`python -m server.embedded.measure_drafters`: how many tokens a step gives with each drafter, on the embedded tasks.

Drives a worker without a scheduler: every step asks for `--drafts` drafts and verifies all that are offered, so the
figures are of the drafter alone. Each output is compared with plain decoding; a difference is an error in verification
(or, in bfloat16 off the CPU, a near-tie) and is counted, not hidden.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from tokenizers import Tokenizer
from tqdm import tqdm

from scheduler.types import Admission, Drafts, Read, Request, Sampling, Span, StepPlan
from server.embedded import functions, tasks
from server.models.locate import resolve_model
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import MASK_DRAFTER, SpeculatorConfig
from server.worker.worker import Worker

MAX_NEW = 48
MAX_NEW_FUNCTION = 120
COMPANY = 4
"""Sequences decoded together."""


@dataclass
class Tally:
    """Sums over the decode steps of one setting. expected: the drafters' own estimates of `accepted`."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    expected: float = 0.0
    draft_s: float = 0.0
    step_s: float = 0.0
    different: int = 0

    def row(self, name: str, temperature: float) -> str:
        steps, drafted = max(1, self.steps), max(1, self.drafted)
        figures = (
            self.drafted / steps,
            self.accepted / drafted,
            self.expected / drafted,
            self.tokens / steps,
            self.draft_s / max(1e-9, self.step_s),
        )
        return f"| {name} | {temperature:g} | {' | '.join(f'{value:.2f}' for value in figures)} | {self.different} |"


@dataclass
class Run:
    """One sequence being decoded."""

    request: Request
    pages: tuple[int, ...]
    tokens: list[int]
    drafts: Drafts | None = None
    output: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        ended = bool(self.output) and self.output[-1] in self.request.stop_ids
        return ended or len(self.output) >= self.request.max_tokens

    def take(self, tokens: Sequence[int]) -> int:
        """Add a step's tokens up to the end of the output; how many count."""
        before = len(self.output)
        for token in tokens:
            if self.is_over:
                break
            self.output.append(token)
            self.tokens.append(token)
        return len(self.output) - before


class Driver:
    """Steps of one worker for a few sequences at a time."""

    def __init__(self, worker: Worker, num_drafts: int) -> None:
        self._worker, self._num_drafts = worker, num_drafts
        self._ids, self._steps = count(1), count(1)

    def decode(self, requests: Sequence[Request], tally: Tally) -> list[list[int]]:
        size = self._worker.info.page_size
        needed = max(len(r.prompt) + r.max_tokens for r in requests) + self._num_drafts + 8
        each = -(-needed // size)
        runs = {
            next(self._ids): Run(request, tuple(range(i * each, (i + 1) * each)), list(request.prompt))
            for i, request in enumerate(requests)
        }
        self._step(runs, dict(runs), tally, first=True)
        while active := {i: run for i, run in runs.items() if not run.is_over}:
            self._step(active, {}, tally)
        self._worker.run(StepPlan(next(self._steps), (), released=tuple(runs)))
        return [run.output for run in runs.values()]

    def _step(self, runs: dict[int, Run], admitted: dict[int, Run], tally: Tally, first: bool = False) -> None:
        plan = StepPlan(
            next(self._steps),
            tuple(self._span(seq_id, run, first) for seq_id, run in runs.items()),
            tuple(Admission(seq_id, run.request, run.request.prompt) for seq_id, run in admitted.items()),
            tuple((seq_id, run.pages) for seq_id, run in admitted.items()),
            draft_depth=self._num_drafts,
        )
        result = self._worker.run(plan)
        for span, outcome in zip(plan.spans, result.outcomes, strict=True):
            if outcome.error is not None:
                raise ValueError(outcome.error)
            run = runs[span.seq_id]
            num_new = run.take(outcome.tokens)
            if not first:
                tally.steps += 1
                tally.tokens += num_new
                tally.drafted += len(span.tokens) - 1
                tally.accepted += len(outcome.tokens) - 1
                tally.expected += sum(run.drafts.survivals) if run.drafts is not None else 0.0
            run.drafts = outcome.drafts
        tally.draft_s += result.draft_s
        tally.step_s += result.elapsed_s

    def _span(self, seq_id: int, run: Run, first: bool) -> Span:
        if first:
            length = len(run.tokens)
            return Span(
                seq_id,
                tuple(run.tokens),
                0,
                length,
                judged=(length - 1,),
                read=Read.SAMPLE,
                num_drafts=self._num_drafts,
                num_masks=self._num_masks(length),
            )
        drafts, start = run.drafts or Drafts((), (), ""), len(run.tokens) - 1
        tokens = (run.tokens[-1], *drafts.tokens)
        parents = (-1, *(parent + 1 for parent in drafts.parents)) if drafts.parents else ()
        judged = tuple(range(len(tokens)))
        read = Read.VERIFY if drafts.tokens else Read.SAMPLE
        return Span(
            seq_id,
            tokens,
            start,
            start + len(tokens),
            judged=judged,
            read=read,
            parents=parents,
            num_drafts=self._num_drafts,
            num_masks=0 if parents else self._num_masks(start + len(tokens)),
        )

    def _num_masks(self, start: int) -> int:
        """Mask rows from `start` to the end of its block, where a drafter asks them (`scheduler/placing.py`)."""
        info = self._worker.info
        if info.diffusion is None or MASK_DRAFTER not in dict(info.drafters):
            return 0
        block = info.diffusion.block_size
        count = min((start // block + 1) * block - start, self._num_drafts)
        return count if count > 1 else 0


def requests_of(tokenizer: Tokenizer, per_task: int, temperature: float, ends: tuple[int, ...]) -> Iterator[Request]:
    """Fresh examples of every task and of functions; each has a seed of its own."""
    known = list(functions.parse_functions().values())
    for task in (*tasks.MAKERS, "function"):
        for i in range(per_task):
            rng = random.Random(f"drafters:{task}:{i}")
            example = functions.draw_function(known, rng) if task == "function" else tasks.make_example(task, rng)
            prompt = tuple(tokenizer.encode(example.prompt, add_special_tokens=False).ids)
            most = MAX_NEW_FUNCTION if task == "function" else MAX_NEW
            yield Request(f"{task}-{i}", prompt, most, Sampling(temperature=temperature, seed=i), stop_ids=ends)


SETTINGS: dict[str, SpeculatorConfig] = {
    **{name: SpeculatorConfig((name,)) for name in ("history", "suffix", "adjacency", "ngram_prob", "trigram")},
    "lookup trees": SpeculatorConfig(("suffix", "adjacency", "ngram_prob", "trigram"), draft_tree=True),
    "diffusion": SpeculatorConfig(("diffusion",)),
    "draft_model fixed": SpeculatorConfig(("draft_model",), draft_stop="fixed"),
    "draft_model confidence": SpeculatorConfig(("draft_model",), draft_stop="confidence"),
    "draft_model acc_head": SpeculatorConfig(("draft_model",), draft_stop="acc_head"),
    "draft_model tree": SpeculatorConfig(("draft_model",), draft_stop="fixed", draft_tree=True),
    "layer_subset uniform:0.5": SpeculatorConfig(("layer_subset",), draft_stop="fixed", layer_subset="uniform:0.5"),
    "layer_subset uniform:0.25": SpeculatorConfig(("layer_subset",), draft_stop="fixed", layer_subset="uniform:0.25"),
    "layer_subset search": SpeculatorConfig(("layer_subset",), draft_stop="fixed", layer_subset="search"),
    "layer_subset exit": SpeculatorConfig(("layer_subset",), draft_stop="fixed", layer_subset="exit"),
}


def build(model: str, draft: str, config: SpeculatorConfig | None, num_drafts: int, dtype: str) -> Worker:
    speculation = None
    if config is not None:
        draft_model = draft if "draft_model" in config.drafters else None
        speculation = SpeculatorConfig(
            config.drafters,
            num_drafts,
            draft_model,
            config.draft_stop,
            config.draft_tree,
            config.layer_subset,
        )
    return build_worker(
        WorkerConfig(model=model, dtype=dtype, kv_cache_bytes=64 << 20, speculation=speculation), progress=False
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="braid-tiny")
    parser.add_argument("--draft", default="braid-tiny-draft")
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", help="comma-separated settings; default: all")
    parser.add_argument("--temperatures", default="0,0.7")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",") if arguments.only else list(SETTINGS)
    temperatures = [float(value) for value in arguments.temperatures.split(",")]
    tokenizer = Tokenizer.from_file(str(resolve_model(arguments.model) / "tokenizer.json"))
    plain = Driver(build(arguments.model, arguments.draft, None, 0, arguments.dtype), 0)
    workers = {name: build(arguments.model, arguments.draft, SETTINGS[name], arguments.drafts, arguments.dtype)
               for name in chosen}  # fmt: skip
    ends = next(iter(workers.values())).info.eos_ids
    print(
        "| drafter | T | drafts a step | accepted | expected | tokens a step | share of time drafting | differences |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for temperature in temperatures:
        asked = list(requests_of(tokenizer, arguments.per_task, temperature, ends))
        groups = [asked[i : i + COMPANY] for i in range(0, len(asked), COMPANY)]
        texts = [plain.decode(group, Tally()) for group in tqdm(groups, desc="plain", leave=False)]
        for name, worker in workers.items():
            tally, driver = Tally(), Driver(worker, arguments.drafts)
            for group, expected in zip(tqdm(groups, desc=name, leave=False), texts, strict=True):
                found = driver.decode(group, tally)
                tally.different += sum(a != b for a, b in zip(found, expected, strict=True))
            print(tally.row(name, temperature), flush=True)


if __name__ == "__main__":
    main()
