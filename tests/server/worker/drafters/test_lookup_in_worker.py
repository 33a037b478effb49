"""Lookup drafters in a worker: the text is that of plain decoding, and what was said before is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.types import Grammar, GrammarKind, Request, Sampling, Speculation, StepPlan, StepResult
from tests.server.worker.drafters.wants import build_lookups
from tests.server.worker.drafting import DraftDriver
from tests.server.worker.tiny_model import EOS, Driver, TinyModel, make_worker

VOCAB = 40
LOOKUPS = ("history", "suffix", "adjacency", "ngram_prob", "trigram", "prediction", "grammar")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def asked(temperature: float, speculation: Speculation | None = None, max_tokens: int = 40) -> list[Request]:
    """Six prompts; without warmth this model soon repeats itself."""
    return [
        Request(
            f"r{i}",
            tuple(3 + (7 * i + 5 * j) % (VOCAB - 3) for j in range(4 + i)),
            max_tokens,
            Sampling(temperature=temperature, seed=i),
            speculation=speculation or Speculation(),
        )
        for i in range(6)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("name", [*LOOKUPS, "all", "all in trees"])
def test_the_text_does_not_depend_on_the_drafter(model: TinyModel, name: str, temperature: float) -> None:
    plain = Driver(make_worker(model, num_pages=300)).generate(asked(temperature))
    names = LOOKUPS if name.startswith("all") else (name,)
    speculator = build_lookups(VOCAB, drafters=names, draft_tree=name == "all in trees")
    driver = DraftDriver(make_worker(model, num_pages=1200, speculator=speculator), most=7, chunk=5)
    requests = asked(temperature)
    if name == "prediction":
        requests = [
            replace(request, speculation=Speculation(prediction=tuple(output)))
            for request, output in zip(requests, plain, strict=True)
        ]
    for again in range(3):
        renamed = [replace(request, id=f"{request.id} {again}") for request in requests]
        assert driver.generate(renamed) == plain
    assert not speculator.disabled
    assert not speculator.num_dropped
    if name != "grammar":
        assert driver.num_accepted > 0
    if name in ("suffix", "prediction", "ngram_prob", "all", "all in trees"):
        # Of 720 tokens; the first round of the stores that learn from others starts from nothing.
        assert driver.num_accepted > 300
    if name == "all in trees":
        assert driver.num_branched > 0


def test_a_step_that_is_run_twice_teaches_and_offers_the_same(model: TinyModel) -> None:
    outputs, taught = [], []
    for times in (1, 2):
        speculator = build_lookups(VOCAB, drafters=LOOKUPS)
        driver = DraftDriver(make_worker(model, num_pages=400, speculator=speculator), most=5)
        driver.execute = repeated(driver, times)
        outputs.append(driver.generate(asked(0.7)))
        taught.append((driver.num_accepted, driver.num_steps))
    assert outputs[0] == outputs[1]
    assert taught[0] == taught[1]


def repeated(driver: DraftDriver, times: int) -> Callable[[StepPlan], StepResult]:
    def execute(plan: StepPlan) -> StepResult:
        results = [driver.worker.run(plan) for _ in range(times)]
        offered = [[outcome.drafts for outcome in result.outcomes] for result in results]
        assert offered == [offered[0]] * times
        return results[-1]

    return execute


def test_forced_tokens_of_a_grammar_are_drafted_and_illegal_drafts_are_not(tokenizer_file: Path) -> None:
    big = TinyModel(320, sharpness=1.0)
    rules = Sampling(temperature=1.0, seed=3, grammar=Grammar(GrammarKind.REGEX, r"(yes|no), the answer is maybe!"))
    request = Request("g", (5, 6, 7), 60, rules, stop_ids=(EOS,))
    (plain,) = Driver(make_worker(big, tokenizer_file=tokenizer_file)).generate([request])
    speculator = build_lookups(320, drafters=("grammar",))
    worker = make_worker(big, tokenizer_file=tokenizer_file, speculator=speculator)
    driver = DraftDriver(worker, most=8)
    assert driver.generate([request]) == [plain]
    assert driver.num_accepted > len(plain) / 2
    assert driver.num_steps < len(plain) / 2
    # What one request taught without the grammar is cut to what the grammar allows.
    free = replace(request, id="free", sampling=replace(rules, grammar=None))
    speculator = build_lookups(320, drafters=("suffix", "grammar"))
    driver = DraftDriver(make_worker(big, tokenizer_file=tokenizer_file, speculator=speculator), most=8)
    driver.generate([free])
    assert driver.generate([request]) == [plain]
