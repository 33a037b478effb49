"""The worker end to end on a tiny float32 model: hand-made plans against a dense loop, alone and in every company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.reference import gumbel_noise
from scheduler.types import Admission, Read, Request, Sampling, Span, StepPlan
from server.worker.sampling import NOT_FINITE
from tests.server.worker.tiny_model import Driver, TinyModel, make_worker

VOCAB = 40


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def request(name: str, length: int = 11, max_tokens: int = 12, **sampling: object) -> Request:
    prompt = tuple(3 + (7 * i + len(name) + ord(name[-1])) % (VOCAB - 3) for i in range(length))
    return Request(name, prompt, max_tokens, Sampling(**sampling))  # type: ignore[arg-type]


def oracle(model: TinyModel, asked: Request) -> list[int]:
    """Greedy or Gumbel-max generation by a dense forward per token, temperature the only rule."""
    tokens, sampling = [*asked.prompt, *asked.output], asked.sampling
    while len(tokens) - len(asked.prompt) < asked.max_tokens:
        logits = model.dense_logits(tokens)[-1]
        if sampling.temperature > 0:
            place = torch.tensor([len(tokens) - len(asked.prompt)])
            seed, index = torch.tensor([sampling.seed]), torch.tensor([sampling.sample_index])
            logits = logits / sampling.temperature + gumbel_noise(VOCAB, seed, index, place)[0]
        tokens.append(int(logits.argmax()))
    return tokens[len(asked.prompt) :]


def mixed() -> list[Request]:
    return [
        request("greedy", 11, temperature=0.0),
        request("warm", 17, temperature=0.8, seed=7),
        request("hot", 3, temperature=1.7, seed=-5, sample_index=2),
        request("page", 16, temperature=1.0, seed=1 << 62),
        request("one", 1, temperature=0.0),
    ]


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
def test_generation_in_chunks_and_in_company_equals_a_dense_loop(model: TinyModel, chunk: int) -> None:
    outputs = Driver(make_worker(model), chunk).generate(mixed())
    assert outputs == [oracle(model, asked) for asked in mixed()]


def test_a_request_alone_gives_the_tokens_it_gives_in_a_crowd(model: TinyModel) -> None:
    features = [
        request("top", temperature=1.0, seed=3, top_p=0.7, top_k=9),
        request("penalties", temperature=0.9, seed=4, repetition_penalty=1.3, presence_penalty=0.4),
        request("min_p", temperature=1.2, seed=5, min_p=0.05, logit_bias=((5, 3.0), (9, -100.0))),
        request("allowed", temperature=1.0, seed=6, allowed_token_ids=(4, 8, 15, 16, 23)),
    ]
    crowd = features + [request(f"n{i}", 5 + i, temperature=1.0, seed=i) for i in range(28)]
    together = Driver(make_worker(model, num_pages=400), chunk=16).generate(crowd)
    alone = [Driver(make_worker(model)).generate([asked])[0] for asked in features]
    assert together[:4] == alone
    assert set(alone[3]) <= {4, 8, 15, 16, 23}
    assert 9 not in alone[2]


def test_a_resubmitted_request_goes_on_where_it_stopped(model: TinyModel) -> None:
    asked = request("resume", temperature=1.0, seed=11, frequency_penalty=0.8, repetition_penalty=1.2, top_p=0.9)
    whole = Driver(make_worker(model)).generate([asked])[0]
    for cut in (1, 5, 11):
        resumed = replace(asked, output=tuple(whole[:cut]))
        assert Driver(make_worker(model), chunk=4).generate([resumed])[0] == whole


def test_samples_of_one_prompt_differ_by_their_index_and_by_nothing_else(model: TinyModel) -> None:
    samples = [request("n", temperature=1.5, seed=9, sample_index=i) for i in range(4)]
    outputs = Driver(make_worker(model)).generate(samples)
    assert len({tuple(output) for output in outputs}) == 4
    assert outputs == [oracle(model, asked) for asked in samples]


def test_a_row_of_nan_fails_alone_and_its_neighbours_keep_their_text() -> None:
    model = TinyModel(VOCAB)
    driver = Driver(make_worker(model))
    clean = Driver(make_worker(model)).generate(mixed())
    model.poisoned_token = mixed()[1].prompt[-1]
    bad = mixed()[1]
    others = [asked for asked in mixed() if model.poisoned_token not in (*asked.prompt, *oracle(model, asked))]
    assert len(others) >= 2
    outputs = driver.generate([bad, *others])
    assert outputs[0] == []
    assert driver.outcomes["warm"][-1].error == NOT_FINITE
    by_name = dict(zip([asked.id for asked in mixed()], clean, strict=True))
    assert outputs[1:] == [by_name[asked.id] for asked in others]


def test_a_failed_step_runs_again_with_some_of_its_spans_as_if_for_the_first_time() -> None:
    model = TinyModel(VOCAB)
    asked = [
        request("a", temperature=1.0, seed=1, repetition_penalty=1.5, frequency_penalty=0.5),
        request("b", temperature=0.0),
        request("c", temperature=1.0, seed=2),
    ]
    clean = Driver(make_worker(model)).generate(asked)
    worker = make_worker(model)
    culprit = asked[1].prompt[0]

    def fail(tokens: torch.Tensor) -> None:
        if culprit in tokens.tolist():
            raise RuntimeError("marked token")

    driver = Driver(worker)
    todo = {i: (r, list(r.prompt), 0, 0) for i, r in enumerate(asked)}
    plan = driver.plan(todo)
    model.before_forward = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="marked"):
            worker.run(plan)
    model.before_forward = lambda tokens: None
    part = replace(plan, spans=(plan.spans[0], plan.spans[2]))
    first = worker.run(part)
    again = worker.run(part)
    assert first.outcomes == again.outcomes
    assert [outcome.tokens[0] for outcome in first.outcomes] == [clean[0][0], clean[2][0]]
    tokens = {0: [*asked[0].prompt, clean[0][0]], 2: [*asked[2].prompt, clean[2][0]]}
    after = worker.run(driver.plan({i: (asked[i], tokens[i], len(asked[i].prompt), 2) for i in (0, 2)}))
    assert [outcome.tokens[0] for outcome in after.outcomes] == [clean[0][1], clean[2][1]]


def test_logprobs_are_of_the_raw_distribution_and_agree_with_themselves(model: TinyModel) -> None:
    asked = request("lp", temperature=0.7, seed=3, logprobs=3, logit_bias=((4, 30.0),), top_k=2)
    driver = Driver(make_worker(model))
    output = driver.generate([asked])[0]
    for place, outcome in enumerate(driver.outcomes["lp"]):
        raw = torch.log_softmax(model.dense_logits([*asked.prompt, *output[:place]])[-1], dim=0)
        (found,) = outcome.logprobs
        assert found.token == output[place]
        assert found.logprob == pytest.approx(raw[found.token].item(), abs=1e-4)
        assert found.rank == 1 + int((raw > raw[found.token]).sum())
        assert [token for token, _ in found.top] == raw.topk(3).indices.tolist()
        assert dict(found.top).get(found.token, found.logprob) == found.logprob


@pytest.mark.parametrize(("chunk", "logits_bytes"), [(1000, 1 << 20), (4, 1 << 20), (1000, 3 * 4 * VOCAB)])
def test_prompt_logprobs_are_the_same_however_the_prompt_is_cut(
    model: TinyModel, chunk: int, logits_bytes: int
) -> None:
    asked = request("echo", 13, temperature=0.0, prompt_logprobs=2, logprobs=0)
    driver = Driver(make_worker(model, logits_bytes=logits_bytes), chunk)
    output = driver.generate([asked, request("other", temperature=1.0)])[0]
    found = [logprob for outcome in driver.outcomes["echo"] for logprob in outcome.prompt_logprobs]
    raw = torch.log_softmax(model.dense_logits(asked.prompt), dim=1)
    assert [logprob.token for logprob in found] == list(asked.prompt[1:])
    assert [logprob.logprob for logprob in found] == pytest.approx(
        [raw[i, token].item() for i, token in enumerate(asked.prompt[1:])], abs=1e-4
    )
    assert all(len(logprob.top) == 2 for logprob in found)
    assert output == oracle(model, asked)


def test_min_tokens_holds_the_end_back_and_then_lets_it_come(model: TinyModel) -> None:
    bias = ((2, 100.0),)
    asked = Request("end", (5, 6, 7), 9, Sampling(temperature=0.0, min_tokens=4, logit_bias=bias), stop_ids=(2,))
    output = Driver(make_worker(model)).generate([asked])[0]
    assert len(output) == 5
    assert output[-1] == 2
    assert 2 not in output[:4]


def test_contradicting_constraints_fail_their_own_request_only(model: TinyModel) -> None:
    bad = request("none", temperature=0.0, allowed_token_ids=(5,), bad_words=((5,),))
    driver = Driver(make_worker(model))
    outputs = driver.generate([bad, mixed()[0]])
    assert outputs[0] == []
    assert "no token is allowed at output position 0 by ALLOWED, BAD_WORDS" in str(driver.outcomes["none"][0].error)
    assert outputs[1] == oracle(model, mixed()[0])


def test_spans_that_break_the_rules_are_refused_before_anything_is_read(model: TinyModel) -> None:
    asked = request("r", 4)
    admitted = (Admission(1, asked, asked.prompt),)
    pages = ((1, (0,)),)

    def run(span: Span) -> None:
        make_worker(model).run(StepPlan(1, (span,), admitted, pages))

    with pytest.raises(ValueError, match="is to be denoised, which this model cannot"):
        run(Span(1, asked.prompt, 0, 4, judged=(3,), read=Read.DENOISE))
    with pytest.raises(ValueError, match="is verified, so all of its rows must be judged"):
        run(Span(1, asked.prompt, 0, 4, judged=(3,), read=Read.VERIFY))
    for parents in ((-1, 0, 2, 1), (0, 0, 0, 0), (-1, 0)):
        with pytest.raises(ValueError, match="are no tree"):
            run(Span(1, asked.prompt, 0, 4, judged=(0, 1, 2, 3), read=Read.VERIFY, parents=parents))
    with pytest.raises(ValueError, match="never admitted"):
        run(Span(2, asked.prompt, 0, 4))
    with pytest.raises(ValueError, match="pages hold 8 tokens"):
        run(Span(1, asked.prompt, 0, 9))
    with pytest.raises(ValueError, match="has no tokens"):
        run(Span(1, (), 0, 4))
