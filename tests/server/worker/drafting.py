"""Speculation without its scheduler and its drafters: a driver that verifies what a scripted drafter offers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.types import Admission, Drafts, Outcome, Read, Request, Span, StepPlan, StepResult
from server.worker.drafters.base import Want
from server.worker.sequences import SequenceState
from server.worker.worker import Worker

Script = Callable[[Want, Sequence[int]], Drafts | None]
"""Drafts for a want, given the tokens that will really follow (as far as they are known)."""


@dataclass
class ScriptedDrafter:
    """A `Proposer` that knows the answers and drafts by a script."""

    script: Script
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    needs_top: int = 0
    drafters: tuple[tuple[str, bool], ...] = (("scripted", False),)
    wants: list[Want] = field(default_factory=list)
    seen: list[tuple[int, ...]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def propose(self, wants: Sequence[Want], depth: int) -> list[Drafts | None]:
        self.wants += wants
        self.seen += [tuple(want.tokens) for want in wants]
        return [self.script(want, self.answers.get(want.state.request.id, ())[want.num_output :]) for want in wants]

    def close(self) -> None:
        pass

    def release(self, released: Iterable[tuple[int, SequenceState]]) -> None:
        self.released += [seq_id for seq_id, _ in released]


def chain(tokens: Sequence[int]) -> Drafts | None:
    return Drafts(tuple(tokens), (1.0,) * len(tokens), "scripted") if tokens else None


def right(want: Want, follows: Sequence[int]) -> Drafts | None:
    return chain(follows[: want.num_drafts])


def wrong(vocab_size: int) -> Script:
    return lambda want, follows: chain([(token + 1) % vocab_size for token in follows[: want.num_drafts]])


def noise(vocab_size: int) -> Script:
    """Any number of drafts, each right with probability 0.6: every length of accepted prefix turns up."""

    def script(want: Want, follows: Sequence[int]) -> Drafts | None:
        rng = random.Random(f"{want.state.request.id} {len(want.tokens)}")
        count = rng.randint(0, want.num_drafts)
        padded = [*follows, *(rng.randrange(vocab_size) for _ in range(count))]
        return chain([t if rng.random() < 0.6 else rng.randrange(vocab_size) for t in padded[:count]])

    return script


def outside(vocab_size: int) -> Script:
    """A right draft, ids that the model does not have, and right drafts after them."""

    def script(want: Want, follows: Sequence[int]) -> Drafts | None:
        rng = random.Random(len(want.tokens))
        drafts = list(follows[: want.num_drafts])
        if drafts:
            drafts[rng.randrange(len(drafts))] = rng.choice((-1, -2, vocab_size, 1 << 40))
        return chain(drafts)

    return script


def tree(vocab_size: int) -> Script:
    """Two to three children a node, the right one anywhere among them, and the likeliest path not first."""

    def script(want: Want, follows: Sequence[int]) -> Drafts | None:
        rng = random.Random(f"{want.state.request.id} {len(want.tokens)}")
        tokens: list[int] = []
        parents: list[int] = []
        frontier = [-1]
        on_path = -1
        depth = 0
        while len(tokens) < want.num_drafts and depth < 5:
            truth = follows[depth] if depth < len(follows) else rng.randrange(vocab_size)
            grown: list[int] = []
            for node in frontier:
                children = rng.sample(range(vocab_size), 2)
                if node == on_path and rng.random() < 0.8:
                    children[rng.randrange(2)] = truth
                for token in dict.fromkeys(children):
                    if len(tokens) < want.num_drafts:
                        tokens.append(token)
                        parents.append(node)
                        grown.append(len(tokens) - 1)
            hits = [node for node in grown if parents[node] == on_path and tokens[node] == truth]
            on_path = hits[0] if hits else -2
            frontier, depth = rng.sample(grown, min(3, len(grown))) if grown else [], depth + 1
            if on_path >= 0 and on_path not in frontier:
                frontier.append(on_path)
            frontier.sort()
        return Drafts(tuple(tokens), (1.0,) * len(tokens), "scripted", tuple(parents)) if tokens else None

    return script


@dataclass
class Run:
    """One sequence of a `DraftDriver`. tokens[:committed] have KV; drafts are what was offered last."""

    request: Request
    tokens: list[int]
    committed: int = 0
    owned: int = 0
    drafts: Drafts | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class DraftDriver:
    """The least speculating scheduler: every sequence at once, up to `most` of the offered drafts verified a step."""

    def __init__(self, worker: Worker, most: int, chunk: int = 1000) -> None:
        self.worker, self.most, self.chunk, self.step = worker, most, chunk, 0
        self.pages = list(range(worker.info.num_pages))
        self.next_id = 0
        self.runs: dict[int, Run] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.num_steps = 0
        self.num_accepted = 0
        self.num_branched = 0
        self.execute: Callable[[StepPlan], StepResult] = worker.run

    def add(self, request: Request) -> int:
        self.next_id += 1
        self.runs[self.next_id] = Run(request, [*request.prompt, *request.output])
        return self.next_id

    def plan(self) -> StepPlan:
        spans, admitted, new_pages = [], [], []
        for seq_id, run in self.runs.items():
            if run.owned == 0:
                admitted.append(Admission(seq_id, run.request, tuple(run.tokens)))
            span = self._span(seq_id, run)
            needed = -(-span.kv_len // self.worker.info.page_size) - run.owned
            if needed > 0:
                new_pages.append((seq_id, tuple(self.pages.pop() for _ in range(needed))))
                run.owned += needed
            spans.append(span)
        self.step += 1
        return StepPlan(self.step, tuple(spans), tuple(admitted), tuple(new_pages), draft_depth=self.most)

    def _span(self, seq_id: int, run: Run) -> Span:
        start, left = run.committed, run.request.max_tokens - run.num_output
        end = min(len(run.tokens), start + self.chunk)
        if start < len(run.tokens) - 1:
            judged: tuple[int, ...] = (end - start - 1,) if end == len(run.tokens) else ()
            wants_prompt = run.request.sampling.prompt_logprobs is not None and start < len(run.request.prompt)
            judged = tuple(range(end - start)) if wants_prompt else judged
            tokens = tuple(run.tokens[start:end])
            return Span(seq_id, tokens, start, end, 1, judged, Read.SAMPLE if judged else Read.NOTHING, (), self.most)
        drafts, count = run.drafts, 0
        if drafts is not None:
            count = min(self.most, len(drafts.tokens), left - 1)
        if drafts is None or count < 1:
            return Span(seq_id, (run.tokens[-1],), start, start + 1, 1, (0,), Read.SAMPLE, (), self.most)
        parents: tuple[int, ...] = ()
        if drafts.parents:
            self.num_branched += 1
            parents = (-1, *(parent + 1 for parent in drafts.parents[:count]))
        tokens = (run.tokens[-1], *drafts.tokens[:count])
        rows = tuple(range(count + 1))
        return Span(seq_id, tokens, start, start + count + 1, 1, rows, Read.VERIFY, parents, self.most)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Output tokens of each request, run together until max_tokens, a stop id or an error."""
        ids = [self.add(request) for request in requests]
        outputs: dict[int, list[int]] = {}
        while self.runs:
            plan = self.plan()
            result = self.execute(plan)
            self.num_steps += 1
            done = [seq_id for seq_id in list(self.runs) if self._take(plan, result, seq_id)]
            for seq_id in done:
                run = self.runs.pop(seq_id)
                outputs[seq_id] = run.tokens[len(run.request.prompt) :]
            self.step += 1
            self.worker.run(StepPlan(self.step, (), released=tuple(done)))
        return [outputs[seq_id] for seq_id in ids]

    def _take(self, plan: StepPlan, result: StepResult, seq_id: int) -> bool:
        """Enter what a step gave for a sequence; True if that was its end."""
        run = self.runs[seq_id]
        span, outcome = next(pair for pair in zip(plan.spans, result.outcomes, strict=True) if pair[0].seq_id == seq_id)
        self.outcomes.setdefault(run.request.id, []).append(outcome)
        run.drafts = outcome.drafts
        run.committed = span.start + len(outcome.tokens) if span.read is Read.VERIFY else span.kv_len
        self.num_accepted += max(0, len(outcome.tokens) - 1)
        for token in outcome.tokens:
            run.tokens.append(token)
            if token in run.request.stop_ids or run.num_output >= run.request.max_tokens:
                return True
        return outcome.error is not None
