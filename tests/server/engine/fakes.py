"""A worker without a model: the next token is a hash of all tokens before it, so every right text is known."""

from __future__ import annotations

import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from scheduler.scheduler import Scheduler
from scheduler.types import UNKNOWN, Delta, Limits, Outcome, Read, Request, Sampling, StepPlan, StepResult
from server.engine.config import EngineConfig, EngineInfo, make_limits
from server.engine.core import EngineCore
from server.engine.runner import Core, run_engine
from server.engine.several import SeveralCores

VOCAB = 500
POISON = 499


def next_token(tokens: Iterable[int], model: str = "") -> int:
    return zlib.crc32(f"{model}{list(tokens)}".encode()) % (VOCAB - 10)


def expected(prompt: Iterable[int], count: int, model: str = "") -> list[int]:
    tokens = list(prompt)
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(next_token(tokens, model))
    return tokens[start:]


def tokens_of(deltas: Iterable[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def request(name: str, prompt: Iterable[int] = (1, 2, 3), max_tokens: int = 8, **sampling: object) -> Request:
    return Request(name, tuple(prompt), max_tokens, Sampling(temperature=0.0, **sampling))  # type: ignore[arg-type]


class FakeWorker:
    """Obeys the plan's contract and nothing else.

    POISON    raises when a span of a sequence whose prompt holds it runs
    patience  the grammar "slow" compiles until it is set
    model     each has texts of its own
    """

    def __init__(
        self, step_s: float = 0.0, raises: Callable[[StepPlan], Exception | None] | None = None, model: str = ""
    ) -> None:
        self.model = model
        self.is_asynchronous = False
        self.known: dict[int, list[int]] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.forgotten: list[str] = []
        self.is_closed = False
        self.patience = threading.Event()
        self.num_runs = 0
        self._step_s, self._raises = step_s, raises

    def prepare(self, request: Request) -> None:
        if request.decoding is not None and request.decoding.selector.name == "learn2pd":
            raise ValueError("learn2pd needs a filter")
        grammar = request.sampling.grammar
        if grammar is None:
            assert request.decoding is not None
            return
        if grammar.source == "bad":
            raise ValueError("the schema is not a schema")
        if grammar.source == "slow":
            self.patience.wait(600)
        if grammar.source == "bug":
            raise RuntimeError("a bug")

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def close(self) -> None:
        self.is_closed = True

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        return partial(self.run, plan)

    def run(self, plan: StepPlan) -> StepResult:
        self.num_runs += 1
        if self._raises is not None and (error := self._raises(plan)) is not None:
            raise error
        for seq_id in plan.released:
            self.known.pop(seq_id, None)
        for admission in plan.admitted:
            self.known.setdefault(admission.seq_id, list(admission.tokens))
            self.prompts[admission.seq_id] = admission.request.prompt
        for span in plan.spans:
            if POISON in self.prompts[span.seq_id]:
                raise RuntimeError("poisoned")
        time.sleep(self._step_s)
        outcomes = []
        for span in plan.spans:
            known = self.known[span.seq_id]
            if span.tokens == (UNKNOWN,):
                span = span._replace(tokens=(known[span.start],))
            if span.read is Read.SAMPLE:
                # What an earlier run of this step, or one behind it, has sampled.
                del known[span.kv_len :]
            assert tuple(known[span.start : span.start + len(span.tokens)]) == span.tokens, "the span is not the text"
            tokens: tuple[int, ...] = ()
            if span.read is Read.SAMPLE and span.start + len(span.tokens) == len(known):
                tokens = (next_token(known, self.model),)
                known.append(tokens[0])
            outcomes.append(Outcome(span.seq_id, tokens))
        return StepResult(plan.step, tuple(outcomes), max(self._step_s, 1e-6))


LIMITS = Limits(max_batched_tokens=256, max_seqs=32, max_model_len=512, num_pages=400, page_size=16)


def fake_core(
    worker: FakeWorker,
    limits: Limits = LIMITS,
    grammar_timeout_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    queue_timeout_s: float | None = None,
    plans_ahead: bool = False,
) -> EngineCore:
    scheduler = Scheduler(limits)
    return EngineCore(
        worker, scheduler, clock, grammar_timeout_s, queue_timeout_s=queue_timeout_s, plans_ahead=plans_ahead
    )


def build_fakes(config: EngineConfig, wake: Callable[[], None]) -> tuple[Core, EngineInfo]:
    """As `server.engine.loop.build_cores`."""
    core, info = build_fake(config, wake)
    if not config.also:
        return core, info
    cores, also = {config.name: core}, []
    for other in config.also:
        cores[other.name], facts = build_fake(other, wake)
        also.append(facts)
    return SeveralCores(cores), replace(info, also=tuple(also))


def build_fake(config: EngineConfig, wake: Callable[[], None]) -> tuple[EngineCore, EngineInfo]:
    """`model` says how the fake engine behaves: "ok", "slow-50ms" (steps of 50 ms), "crash", "device-error", "hang",
    "bad-start", "die-at-start"."""
    import os

    if config.model == "bad-start":
        raise ValueError("no such model\n  'bad-start'")
    if config.model == "die-at-start":
        os._exit(9)

    def raises(plan: StepPlan) -> Exception | None:
        if config.model == "hang" and plan.step > 3:
            time.sleep(3600)
        if config.model == "crash" and plan.step > 3:
            return SystemExit(1)  # type: ignore[return-value]
        if config.model == "device-error" and plan.step > 3:
            return RuntimeError("CUDA error: device-side assert triggered")
        return None

    slow = re.fullmatch(r"slow-(\d+)ms", config.model)
    worker = FakeWorker(int(slow[1]) / 1000 if slow else 0.005, raises, config.name)
    limits = make_limits(config, 512, 400, 16)
    info = EngineInfo(
        config.model, 512, VOCAB, 1, 400, 16, 1, 1, "float32", "cpu", "fake", (2,),
        limits.max_batched_tokens, limits.max_seqs, limits.max_queued_requests, limits.max_queued_tokens,
        20, None, True, os.getpid(), name=config.name,
    )  # fmt: skip
    core = EngineCore(
        worker, Scheduler(limits), grammar_timeout_s=60.0, wake=wake, queue_timeout_s=config.queue_timeout_s
    )
    return core, info


if __name__ == "__main__":
    sys.exit(run_engine(build_fakes))
