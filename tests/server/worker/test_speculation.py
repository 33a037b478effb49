"""Speculation is exact: whatever is drafted, the tokens, log-probabilities and errors are those of plain decoding."""

from __future__ import annotations

import pytest

from scheduler.types import Request, Sampling, TokenLogprob
from tests.server.worker.drafting import DraftDriver, Script, ScriptedDrafter, noise, outside, right, tree, wrong
from tests.server.worker.tiny_model import Driver, TinyModel, make_worker

VOCAB = 40
SCRIPTS: dict[str, Script] = {
    "right": right,
    "wrong": wrong(VOCAB),
    "noise": noise(VOCAB),
    "outside": outside(VOCAB),
    "tree": tree(VOCAB),
}
RULES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, "logprobs": 0},
    "warm": {"temperature": 0.7, "logprobs": 2},
    "hot": {"temperature": 1.3, "sample_index": 3},
    "repetition": {"repetition_penalty": 1.6, "logprobs": 1},
    "counted": {"presence_penalty": 0.7, "frequency_penalty": 0.9},
    "counted greedy": {"temperature": 0.0, "frequency_penalty": 1.1, "repetition_penalty": 1.2},
    "bias": {"logit_bias": ((5, 2.5), (9, -100.0))},
    "bad words": {"bad_words": ((7,), (11, 12), (4, 5, 6), *((a, a) for a in range(3, VOCAB)))},
    "min tokens": {"min_tokens": 9, "logit_bias": ((2, 6.0),)},
    "allowed": {"allowed_token_ids": (4, 8, 15, 16, 23)},
    "min p": {"min_p": 0.08},
    "top k": {"top_k": 4, "logprobs": 3},
    "top p": {"top_p": 0.6},
    "all": {"top_k": 9, "top_p": 0.8, "min_p": 0.01, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 1},
}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def matrix(max_tokens: int = 24) -> list[Request]:
    """One request per rule; the stop id ends some of them early."""
    return [
        Request(
            name,
            tuple(3 + (7 * i + 5 * number) % (VOCAB - 3) for i in range(3 + 2 * number)),
            max_tokens,
            Sampling(**{"temperature": 1.0, "seed": number, **rules}),  # type: ignore[arg-type]
            stop_ids=(2,),
        )
        for number, (name, rules) in enumerate(RULES.items())
    ]


def logprobs(driver: Driver | DraftDriver, name: str) -> list[TokenLogprob]:
    return [logprob for outcome in driver.outcomes[name] for logprob in outcome.logprobs]


def same_logprobs(found: list[TokenLogprob], wanted: list[TokenLogprob]) -> None:
    assert [(item.token, item.rank) for item in found] == [(item.token, item.rank) for item in wanted]
    assert [item.logprob for item in found] == pytest.approx([item.logprob for item in wanted], abs=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-5)


@pytest.fixture(scope="module")
def plain(model: TinyModel) -> tuple[Driver, dict[str, list[int]]]:
    driver = Driver(make_worker(model, num_pages=400))
    outputs = driver.generate(matrix())
    return driver, {asked.id: output for asked, output in zip(matrix(), outputs, strict=True)}


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_sampling_rule_gives_the_tokens_and_logprobs_of_plain_decoding(
    model: TinyModel, plain: tuple[Driver, dict[str, list[int]]], name: str, most: int
) -> None:
    driver, answers = plain
    worker = make_worker(model, num_pages=400, speculator=ScriptedDrafter(SCRIPTS[name], answers))
    speculating = DraftDriver(worker, most, chunk=5)
    outputs = speculating.generate(matrix())
    assert dict(zip(answers, outputs, strict=True)) == answers
    for asked in matrix():
        cut = len(answers[asked.id])
        same_logprobs(logprobs(speculating, asked.id)[:cut], logprobs(driver, asked.id))
    if name == "right":
        assert speculating.num_steps < 8 + 24 // (most + 1) + 24 % (most + 1)
    if name == "wrong":
        assert speculating.num_accepted == 0
