"""What stands behind a verified span: grammars, failing rows, repeated steps, the KV it leaves, who may see drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.sparse import SparseLayer
from scheduler.types import Admission, Grammar, GrammarKind, Read, Request, Sampling, Span, StepPlan, StepResult
from server.worker.sampling import NOT_FINITE
from server.worker.worker import Worker
from tests.server.worker.drafting import DraftDriver, Script, ScriptedDrafter, noise, outside, right, tree, wrong
from tests.server.worker.tiny_model import EOS, Driver, TinyModel, make_worker

VOCAB = 40
GRAMMAR_VOCAB = 320
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
GRAMMARS = {
    GrammarKind.JSON_SCHEMA: SCHEMA,
    GrammarKind.REGEX: r"(ab|cd){2,5}-[0-9]{3}",
    GrammarKind.CHOICE: '["yes", "no", "maybe not"]',
}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def some_requests(count: int = 6, max_tokens: int = 20, **sampling: object) -> list[Request]:
    rules: dict[str, object] = {"temperature": 0.8, "presence_penalty": 0.4, **sampling}
    return [
        Request(
            f"r{i}",
            tuple(3 + (7 * i + 3 * j) % (VOCAB - 3) for j in range(4 + 3 * i)),
            max_tokens,
            Sampling(seed=i, **rules),  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


def answers_of(model: TinyModel, requests: list[Request], **options: Path) -> dict[str, list[int]]:
    outputs = Driver(make_worker(model, num_pages=400, **options)).generate(requests)  # type: ignore[arg-type]
    return {asked.id: output for asked, output in zip(requests, outputs, strict=True)}


def speculating(
    model: TinyModel, script: Script, answers: dict[str, list[int]], most: int, **options: Path
) -> DraftDriver:
    worker = make_worker(model, num_pages=400, speculator=ScriptedDrafter(script, answers), **options)  # type: ignore[arg-type]
    return DraftDriver(worker, most, chunk=6)


@pytest.mark.parametrize("script", [right, noise(GRAMMAR_VOCAB), wrong(GRAMMAR_VOCAB), outside(GRAMMAR_VOCAB)])
@pytest.mark.parametrize("most", [1, 4])
def test_drafts_in_and_out_of_a_grammar_leave_its_text_alone(script: Script, most: int, tokenizer_file: Path) -> None:
    model = TinyModel(GRAMMAR_VOCAB, sharpness=1.0)
    requests = [
        Request(
            f"{kind}{seed}",
            (5, 6, 7),
            60,
            Sampling(temperature=seed / 2, seed=seed, grammar=Grammar(kind, source), logit_bias=((90, 1.0),)),
            stop_ids=(EOS,),
        )
        for kind, source in GRAMMARS.items()
        for seed in range(3)
    ]
    answers = answers_of(model, requests, tokenizer_file=tokenizer_file)
    driver = speculating(model, script, answers, most, tokenizer_file=tokenizer_file)
    assert dict(zip(answers, driver.generate(requests), strict=True)) == answers
    assert not [outcome.error for outcomes in driver.outcomes.values() for outcome in outcomes if outcome.error]


@pytest.mark.parametrize("script", [right, noise(GRAMMAR_VOCAB), tree(GRAMMAR_VOCAB)])
def test_drafts_after_a_stop_id_that_the_grammar_does_not_know_are_not_read(
    script: Script, tokenizer_file: Path
) -> None:
    model = TinyModel(GRAMMAR_VOCAB, sharpness=1.0)
    rules = Sampling(temperature=1.0, grammar=Grammar(GrammarKind.REGEX, "[a-d]{3}"), logit_bias=((7, 50.0),))
    requests = [replace_seed(Request(f"s{i}", (9, 9), 12, rules, stop_ids=(7,)), i) for i in range(4)]
    answers = answers_of(model, requests, tokenizer_file=tokenizer_file)
    assert all(output[-1] == 7 for output in answers.values())
    beyond = {name: [*output, 8, 9, 10] for name, output in answers.items()}
    driver = speculating(model, script, beyond, 7, tokenizer_file=tokenizer_file)
    assert dict(zip(answers, driver.generate(requests), strict=True)) == answers


def replace_seed(request: Request, seed: int) -> Request:
    return replace(request, sampling=replace(request.sampling, seed=seed))


@pytest.mark.parametrize("script", [right, noise(VOCAB), tree(VOCAB), wrong(VOCAB)])
def test_a_row_that_fails_ends_its_request_only_where_plain_decoding_reaches_it(script: Script) -> None:
    model = TinyModel(VOCAB)
    requests = some_requests()
    clean = answers_of(model, requests)
    model.poisoned_token = clean["r2"][9]
    plain = Driver(make_worker(model, num_pages=400))
    outputs = plain.generate(requests)
    assert any(len(output) < 20 for output in outputs)
    driver = speculating(model, script, clean, 5)
    assert driver.generate(requests) == outputs
    for asked, output in zip(requests, outputs, strict=True):
        wanted = NOT_FINITE if len(output) < 20 else None
        assert plain.outcomes[asked.id][-1].error == driver.outcomes[asked.id][-1].error == wanted


def test_constraints_that_contradict_each_other_on_a_later_row_fail_there(model: TinyModel) -> None:
    asked = Request("none", (5, 6), 9, Sampling(temperature=0.0, allowed_token_ids=(5,), bad_words=((5, 5, 5, 5),)))
    driver = speculating(model, right, {"none": [5] * 9}, 8)
    assert driver.generate([asked]) == [[5, 5, 5]]
    assert "at output position 3 by ALLOWED, BAD_WORDS" in str(driver.outcomes["none"][-1].error)


@pytest.mark.parametrize("script", [noise(VOCAB), tree(VOCAB)])
def test_a_step_that_is_run_again_whole_or_in_parts_gives_the_same(model: TinyModel, script: Script) -> None:
    requests = some_requests(logprobs=1, repetition_penalty=1.2)
    answers = answers_of(model, requests)
    driver = speculating(model, script, answers, 6)

    def run_often(plan: StepPlan) -> StepResult:
        first = driver.worker.run(plan)
        half = len(plan.spans) // 2
        parts = [driver.worker.run(replace(plan, spans=spans)) for spans in (plan.spans[half:], plan.spans[:half])]
        assert said(parts[1]) + said(parts[0]) == said(first)
        assert driver.worker.run(plan).outcomes == first.outcomes
        return first

    def said(result: StepResult) -> list[tuple[object, ...]]:
        """Without the values of log-probabilities: a product of matrices of another shape rounds differently."""
        return [
            (outcome.tokens, [found.rank for found in outcome.logprobs], outcome.error, outcome.drafts)
            for outcome in result.outcomes
        ]

    driver.execute = run_often
    assert dict(zip(answers, driver.generate(requests), strict=True)) == answers


def test_a_step_that_failed_after_its_histories_were_written_runs_again() -> None:
    model = TinyModel(VOCAB)
    requests = some_requests()
    answers = answers_of(model, requests)
    driver = speculating(model, noise(VOCAB), answers, 6)
    failing = iter([False, True] * 500)

    def fail(tokens: torch.Tensor) -> None:
        if next(failing):
            raise RuntimeError("every other forward fails")

    def run_until_it_works(plan: StepPlan) -> StepResult:
        model.before_forward = fail
        try:
            return driver.worker.run(plan)
        except RuntimeError:
            return driver.worker.run(plan)

    driver.execute = run_until_it_works
    assert dict(zip(answers, driver.generate(requests), strict=True)) == answers


@pytest.mark.parametrize("script", [right, wrong(VOCAB), noise(VOCAB), tree(VOCAB)])
def test_a_history_never_holds_a_draft_that_was_not_accepted(model: TinyModel, script: Script) -> None:
    requests = some_requests()
    answers = answers_of(model, requests)
    driver = speculating(model, script, answers, 5)

    def run(plan: StepPlan) -> StepResult:
        result = driver.worker.run(plan)
        for span, outcome in zip(plan.spans, result.outcomes, strict=True):
            known = [*driver.runs[span.seq_id].tokens, *outcome.tokens]
            assert driver.worker._sequences[span.seq_id].history == known[: len(known) - bool(outcome.tokens)]
        return result

    driver.execute = run
    driver.generate(requests)


def keys_and_values(worker: Worker, seq_id: int, length: int) -> list[torch.Tensor]:
    """K and V of the first `length` positions, per layer [length, 2, K, D]; the reference layout."""
    state, size = worker._sequences[seq_id], worker.info.page_size
    slots = worker._sequences.page_table[state.slot]
    at = torch.arange(length)
    pages = torch.from_numpy(slots.copy()).long()[at // size]
    return [torch.stack((k[pages, :, at % size], v[pages, :, at % size]), 1) for k, v in worker._pool.layers]


@pytest.mark.parametrize("script", [right, noise(VOCAB), tree(VOCAB)])
def test_the_keys_that_speculation_leaves_are_those_of_a_prompt_of_the_same_tokens(
    model: TinyModel, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_requests(max_tokens=60)
    driver = speculating(model, script, answers_of(model, requests), 7)
    for asked in requests:
        driver.add(asked)
    moved = count_moves(model, monkeypatch)
    for _ in range(8):
        plan = driver.plan()
        result = driver.worker.run(plan)
        for seq_id in list(driver.runs):
            if driver._take(plan, result, seq_id):
                del driver.runs[seq_id]
    assert driver.runs
    assert bool(moved) is (driver.num_branched > 0)
    for seq_id, run in driver.runs.items():
        fresh = make_worker(model)
        tokens, size = tuple(run.tokens[: run.committed]), fresh.info.page_size
        pages = tuple(range(-(-len(tokens) // size)))
        admitted = (Admission(1, replace(run.request, prompt=tokens), tokens),)
        fresh.run(StepPlan(1, (Span(1, tokens, 0, len(tokens)),), admitted, ((1, pages),)))
        found = keys_and_values(driver.worker, seq_id, run.committed)
        for one, other in zip(found, keys_and_values(fresh, 1, run.committed), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def count_moves(model: TinyModel, patch: pytest.MonkeyPatch) -> list[int]:
    moved: list[int] = []
    move = model.ops.move_kv

    def counting(
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
        layer: SparseLayer | None = None,
    ) -> None:
        moved.append(len(sources))
        move(k_pages, v_pages, sources, targets, layer)

    patch.setattr(model.ops, "move_kv", counting)
    return moved


@pytest.mark.parametrize("script", [noise(VOCAB), tree(VOCAB)])
def test_pages_filled_by_speculation_serve_another_sequence_as_a_prefix(model: TinyModel, script: Script) -> None:
    (asked,) = some_requests(1, max_tokens=40)
    driver = speculating(model, script, answers_of(model, [asked]), 7)
    driver.add(asked)
    run, worker = driver.runs[1], driver.worker
    size = worker.info.page_size
    while run.committed < 3 * size:
        plan = driver.plan()
        assert not driver._take(plan, driver.worker.run(plan), 1)
    num_pages = run.committed // size
    tokens = (*run.tokens[: num_pages * size], 3)
    heir = Request("heir", tokens, 5, Sampling(temperature=0.0, logprobs=5))
    shared = tuple(worker._sequences.page_table[worker._sequences[1].slot, :num_pages].tolist())
    span = Span(9, (3,), num_pages * size, num_pages * size + 1, judged=(0,), read=Read.SAMPLE)
    plan = StepPlan(500, (span,), (Admission(9, heir, tokens),), ((9, (*shared, driver.pages.pop())),))
    (hit,) = worker.run(plan).outcomes
    raw = torch.log_softmax(model.dense_logits(tokens)[-1], dim=0)
    assert [token for token, _ in hit.logprobs[0].top] == raw.topk(5).indices.tolist()
    assert [value for _, value in hit.logprobs[0].top] == pytest.approx(raw.topk(5).values.tolist(), abs=1e-4)


def test_a_drafter_sees_every_token_and_no_history_keeps_the_last_one(model: TinyModel) -> None:
    requests = some_requests()
    answers = answers_of(model, requests)
    drafter = ScriptedDrafter(noise(VOCAB), answers, needs_top=3)
    driver = DraftDriver(make_worker(model, num_pages=400, speculator=drafter), 4)
    driver.generate(requests)
    by_id = {asked.id: asked for asked in requests}
    assert drafter.wants
    for want, seen in zip(drafter.wants, drafter.seen, strict=True):
        asked = by_id[want.state.request.id]
        whole = (*asked.prompt, *answers[asked.id])
        assert seen == whole[: len(seen)]
        assert want.num_drafts <= len(whole) - len(seen) - 1, "drafts that max_tokens leaves no room for"
        assert want.tops is not None
        assert want.tops.ends[-1] == len(seen) - 1
        for end, ids, logprobs in zip(want.tops.ends, want.tops.ids, want.tops.logprobs, strict=True):
            assert end >= len(asked.prompt)
            assert len(ids) == len(logprobs) == 3
            assert list(logprobs) == sorted(logprobs, reverse=True)
    assert sorted(drafter.released) == sorted(range(1, len(requests) + 1))


def test_no_drafter_is_asked_when_the_plan_wants_no_drafts(model: TinyModel) -> None:
    drafter = ScriptedDrafter(right)
    driver = DraftDriver(make_worker(model, speculator=drafter), 0)
    driver.generate(some_requests(2))
    assert drafter.wants == []
    assert all(outcome.drafts is None for outcomes in driver.outcomes.values() for outcome in outcomes)


def test_no_drafter_is_asked_about_a_sequence_that_has_ended(model: TinyModel) -> None:
    unending = some_requests()
    answers = answers_of(model, unending)
    requests = [replace(asked, stop_ids=(answers[asked.id][7],)) for asked in unending]
    drafter = ScriptedDrafter(noise(VOCAB), answers)
    driver = DraftDriver(make_worker(model, num_pages=400, speculator=drafter), 4)
    outputs = driver.generate(requests)
    assert all(
        len(output) <= 8 and output[-1] in asked.stop_ids for output, asked in zip(outputs, requests, strict=True)
    )
    for want, seen in zip(drafter.wants, drafter.seen, strict=True):
        assert set(seen[want.state.num_prompt :]).isdisjoint(want.state.request.stop_ids)


@pytest.mark.parametrize("script", [noise(VOCAB), tree(VOCAB)])
def test_logits_are_made_for_whole_spans_within_their_memory(
    model: TinyModel, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_requests(logprobs=1)
    answers = answers_of(model, requests)
    sizes: list[int] = []
    logits = model.logits

    def counting(hidden_JH: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden_JH))
        return logits(hidden_JH)

    monkeypatch.setattr(model, "logits", counting)
    worker = make_worker(model, num_pages=400, logits_bytes=7 * 4 * VOCAB, speculator=ScriptedDrafter(script, answers))
    assert dict(zip(answers, DraftDriver(worker, 4).generate(requests), strict=True)) == answers
    assert 5 < max(sizes) <= 7
    assert max(sizes) < sum(5 for _ in requests)
