"""Verification by rejection through the worker: the law of the text is the target's, alone and run again."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from scheduler.types import Drafts, Request, Sampling, Speculation, StepPlan, StepResult, VerifyMode
from server.worker.drafters.base import Want
from tests.server.worker.drafting import DraftDriver, Script, ScriptedDrafter, chain, noise, outside, right, wrong
from tests.server.worker.tiny_model import Driver, TinyModel, make_worker

VOCAB = 6
MODES = [VerifyMode.REJECTION, VerifyMode.BLOCK]
Q = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.05, 0.05, 0.3]])


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB, sharpness=1.5)


def drawn(want: Want, follows: Sequence[int]) -> Drafts | None:
    """Two drafts drawn from Q, and the worker is told so."""
    rng = random.Random(f"{want.state.request.sampling.seed} {len(want.tokens)}")
    count = min(2, want.num_drafts)
    want.state.draft_q = Q[:count].clone()
    return chain([rng.choices(range(VOCAB), row)[0] for row in Q[:count].tolist()])


def fixed(want: Want, follows: Sequence[int]) -> Drafts | None:
    """Drafts that were not drawn: the same for every seed."""
    return chain([0, 4][: want.num_drafts])


def strange(want: Want, follows: Sequence[int]) -> Drafts | None:
    """A fixed draft and one that is no id of the model."""
    return chain([0, VOCAB + 3][: want.num_drafts])


def lying(want: Want, follows: Sequence[int]) -> Drafts | None:
    """Fixed drafts that are said to be drawn."""
    want.state.draft_q = Q[: min(2, want.num_drafts)].clone()
    return fixed(want, follows)


def off_by_law(model: TinyModel, mode: VerifyMode, script: Script, count: int = 1920) -> float:
    """By how many deviations chi-square exceeds its mean: the first three of four tokens against the model's law."""
    prompt, temperature = (1, 4, 2, 5), 0.9
    worker = make_worker(model, num_pages=400, max_seqs=128, speculator=ScriptedDrafter(script))
    driver = DraftDriver(worker, 2)
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, count, 120):
        rules = [
            Sampling(temperature=temperature, seed=seed * 0x9E3779B97F4A7C15 % (1 << 63))
            for seed in range(first, first + 120)
        ]
        requests = [Request(str(rule.seed), prompt, 4, rule, speculation=Speculation(verify=mode)) for rule in rules]
        driver.pages = list(range(400))
        counts.update(tuple(output[:3]) for output in driver.generate(requests))
    assert driver.num_accepted > count / 8
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        rows = {text: torch.softmax(model.dense_logits((*prompt, *text))[-1] / temperature, 0).tolist() for text in law}
        law = {(*text, token): law[text] * rows[text][token] for text in law for token in range(VOCAB)}
    total = sum(counts.values())
    cells = [(counts[text], total * weight) for text, weight in law.items() if total * weight >= 5]
    rest = (total - sum(found for found, _ in cells), total - sum(due for _, due in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((found - due) ** 2 / due for found, due in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", [drawn, fixed, strange])
def test_texts_follow_the_law_of_the_model(model: TinyModel, mode: VerifyMode, script: Script) -> None:
    assert off_by_law(model, mode, script) < 4


@pytest.mark.parametrize("mode", MODES)
def test_the_same_test_sees_fixed_drafts_that_are_verified_as_if_they_were_drawn(
    model: TinyModel, mode: VerifyMode
) -> None:
    assert off_by_law(model, mode, lying) > 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", [right, wrong(VOCAB), noise(VOCAB), outside(VOCAB), drawn])
def test_greedy_requests_get_the_text_of_plain_decoding(mode: VerifyMode, script: Script) -> None:
    model = TinyModel(40 if script is right else VOCAB)
    requests = [
        Request(
            f"r{i}",
            tuple((i + 3 * j) % VOCAB for j in range(3 + i)),
            20,
            Sampling(temperature=0.0, seed=i, frequency_penalty=0.8 * i, logprobs=1),
            speculation=Speculation(verify=mode),
        )
        for i in range(5)
    ]
    plain = Driver(make_worker(model))
    outputs = plain.generate(requests)
    answers = {asked.id: output for asked, output in zip(requests, outputs, strict=True)}
    driver = DraftDriver(make_worker(model, speculator=ScriptedDrafter(script, answers)), 2)
    assert driver.generate(requests) == outputs
    for asked in requests:
        found = [logprob for outcome in driver.outcomes[asked.id] for logprob in outcome.logprobs]
        wanted = [logprob for outcome in plain.outcomes[asked.id] for logprob in outcome.logprobs]
        assert [item.token for item in found[: len(wanted)]] == [item.token for item in wanted]
        assert [item.logprob for item in found[: len(wanted)]] == pytest.approx(
            [item.logprob for item in wanted], abs=1e-5
        )


@pytest.mark.parametrize("mode", MODES)
def test_what_the_drafts_of_a_step_were_drawn_from_is_still_known_when_it_runs_again(
    model: TinyModel, mode: VerifyMode
) -> None:
    requests = [
        Request(str(i), (1, 2, 3, i % VOCAB), 16, Sampling(seed=i), speculation=Speculation(verify=mode))
        for i in range(12)
    ]
    once = DraftDriver(make_worker(model, speculator=ScriptedDrafter(drawn)), 2).generate(requests)
    driver = DraftDriver(make_worker(model, speculator=ScriptedDrafter(drawn)), 2)

    def run_often(plan: StepPlan) -> StepResult:
        first = driver.worker.run(plan)
        driver.worker.run(replace(plan, spans=plan.spans[::2]))
        assert driver.worker.run(plan).outcomes == first.outcomes
        return first

    driver.execute = run_often
    assert driver.generate(requests) == once
