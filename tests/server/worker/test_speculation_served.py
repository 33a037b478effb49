"""Speculation with all its real parts, engine core to kernels: the embedded model in float32 on the CPU says the same
with every lookup drafter, chains and trees, as without; in chunks, with too few pages and with failing steps, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from scheduler.scheduler import Scheduler
from scheduler.types import (
    Delta,
    FinishReason,
    Grammar,
    GrammarKind,
    Limits,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
    SpeculationSettings,
    StepPlan,
    StepStats,
    TokenLogprob,
)
from server.engine.core import EngineCore
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import SpeculatorConfig
from server.worker.worker import Worker
from tests.server.worker.test_speculation import RULES, same_logprobs

NUM_OUT = 28
PAGE = 16
DRAFTERS = {
    "default": SpeculatorConfig(),
    "stores": SpeculatorConfig(drafters=("history", "ngram_prob", "trigram", "adjacency")),
    "trees": SpeculatorConfig(drafters=("grammar", "suffix", "ngram_prob"), draft_tree=True),
}


def make_worker(asked: SpeculatorConfig | None) -> Worker:
    config = WorkerConfig(
        dtype="float32",
        device="cpu",
        kv_cache_bytes=48 << 20,
        page_size=PAGE,
        max_model_len=256,
        max_batched_tokens=256,
        num_threads=1,
        speculation=asked,
        remember_profile=False,
    )
    return build_worker(config, progress=False)


@pytest.fixture(scope="module")
def plain() -> Worker:
    return make_worker(None)


@pytest.fixture(scope="module", params=DRAFTERS)
def speculating(request: pytest.FixtureRequest) -> Worker:
    return make_worker(DRAFTERS[request.param])


def requests(mode: SpeculationMode = SpeculationMode.ON) -> list[Request]:
    """One per sampling rule and some grammars; prompts repeat themselves, so that there is something to look up."""
    rules = [Sampling(**{"temperature": 0.6, "seed": i, **fields}) for i, fields in enumerate(RULES.values())]  # type: ignore[arg-type]
    schema = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}'
    rules.append(Sampling(temperature=0.0, grammar=Grammar(GrammarKind.JSON_SCHEMA, schema), logprobs=1))
    rules.append(Sampling(temperature=1.0, seed=5, grammar=Grammar(GrammarKind.REGEX, "(abc|de){3,9}!")))
    made = []
    for i, rule in enumerate(rules):
        phrase = [20 + (37 * i + 101 * j) % 900 for j in range(4 + i % 5)]
        prompt, follows = tuple(phrase * (3 + i % 4)), tuple(phrase)
        asked = Speculation(mode=mode, prediction=follows if i % 3 == 0 else ())
        made.append(Request(f"r{i}", prompt, NUM_OUT, rule, stop_ids=(0, 2), speculation=asked))
    return made


def limits(worker: Worker) -> Limits:
    return Limits(256, 64, worker.info.model_len, worker.info.num_pages, PAGE)


class Text:
    """What a request got."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.end: tuple[FinishReason | None, str | None] = (None, None)
        self.accepted = 0

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.accepted += delta.speculation.accepted if delta.speculation is not None else 0
        if delta.finish_reason is not None:
            self.end = (delta.finish_reason, delta.fault.message if delta.fault is not None else None)


def serve(
    worker: Worker, asked: Sequence[Request], allowed: Limits | None = None
) -> tuple[dict[str, Text], list[StepStats]]:
    settings = SpeculationSettings("fixed", 6) if worker.info.drafters else None
    core = EngineCore(worker, Scheduler(allowed or limits(worker), speculation=settings), grammar_timeout_s=120.0)
    for request in asked:
        core.add(request)
    texts = {request.id: Text() for request in asked}
    steps: list[StepStats] = []
    give_up_at = time.monotonic() + 300
    while core.has_work:
        assert time.monotonic() < give_up_at
        deltas, stats = core.step()
        steps += [stats] if stats is not None else []
        for delta in deltas:
            texts[delta.request_id].add(delta)
    # The next scheduler counts its sequences from the start again.
    worker.run(StepPlan(-1, (), released=tuple(worker._sequences._states)))
    return texts, steps


@pytest.fixture(scope="module")
def wanted(plain: Worker) -> dict[str, Text]:
    texts, _ = serve(plain, requests())
    assert all(text.end[0] in (FinishReason.LENGTH, FinishReason.STOP) for text in texts.values())
    return texts


def same(found: dict[str, Text], wanted: dict[str, Text]) -> None:
    for name, text in wanted.items():
        assert found[name].tokens == text.tokens, name
        assert found[name].end == text.end, name
        same_logprobs(found[name].logprobs, text.logprobs)


def test_every_rule_gives_the_text_of_a_server_that_does_not_speculate(
    speculating: Worker, wanted: dict[str, Text]
) -> None:
    found, steps = serve(speculating, requests())
    same(found, wanted)
    assert sum(text.accepted for text in found.values()) > 20
    assert sum(stats.draft_tokens for stats in steps) > 20
    again, _ = serve(speculating, requests())
    same(again, wanted)


def test_a_request_that_wants_no_drafts_gets_none_and_the_same_text(
    speculating: Worker, wanted: dict[str, Text]
) -> None:
    found, steps = serve(speculating, requests(SpeculationMode.OFF))
    same(found, wanted)
    assert sum(stats.draft_tokens for stats in steps) == 0


def test_too_few_pages_and_prompts_in_chunks_change_nothing(speculating: Worker, wanted: dict[str, Text]) -> None:
    """Who is preempted depends on how fast the steps are, so pools of several sizes are tried."""
    num_preempted = num_accepted = 0
    for num_pages in (16, 17, 18, 20):
        few = replace(limits(speculating), num_pages=num_pages, watermark_pages=0, max_batched_tokens=64, max_seqs=14)
        found, steps = serve(speculating, requests(), few)
        same(found, wanted)
        num_preempted += sum(stats.num_preempted for stats in steps)
        num_accepted += sum(stats.accepted_tokens for stats in steps)
    assert num_preempted > 0
    assert num_accepted > 0


def test_a_request_whose_rows_break_the_forward_pass_fails_alone(
    speculating: Worker, wanted: dict[str, Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = Request("culprit", (3333, 3334, 3335), NUM_OUT, Sampling(temperature=0.0))
    forward: Callable[..., Tensor] = speculating._model.forward

    def fail(tokens_T: Tensor, *rest: object) -> Tensor:
        if 3334 in tokens_T.tolist():
            raise RuntimeError("this prompt")
        return forward(tokens_T, *rest)

    monkeypatch.setattr(speculating._model, "forward", fail)
    assert not any(3334 in text.tokens for text in wanted.values())
    late = [*requests()[:6], culprit, *requests()[6:]]
    found, _ = serve(speculating, late)
    assert found.pop("culprit").end[0] is FinishReason.ERROR
    same(found, wanted)
