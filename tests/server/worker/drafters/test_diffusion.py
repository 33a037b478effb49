"""Drafts by denoising: where mask rows stand, what they see, that token rows never notice, and what is made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.reference import ReferenceOps
from scheduler.types import Read, Request, Sampling, Span, Speculation, StepPlan, StepResult, VerifyMode
from server.embedded.measure_drafters import Driver, Tally
from server.models.loading import load_model
from server.models.locate import resolve_model
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.base import Want
from server.worker.drafters.config import SpeculatorConfig
from server.worker.drafters.diffusion import BlockProber, DiffusionDrafter
from server.worker.worker import Worker
from tests.server.models.paged import PagedRunner
from tests.server.worker.drafters.model_rig import CPU, Sequences
from tests.server.worker.tiny_model import TinyModel
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoint

MASK, BLOCK = 310, 8
DUAL: dict[str, Any] = {"mask_token_id": MASK, "block_size": BLOCK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("dual"), "qwen3", **DUAL)


def make(folder: Path | str, with_drafts: bool = True) -> Worker:
    asked = SpeculatorConfig(drafters=("diffusion",)) if with_drafts else None
    return build_worker(
        WorkerConfig(str(folder), "float32", "cpu", kv_cache_bytes=4 << 20, num_threads=1, speculation=asked), False
    )


def requests(**sampling: Any) -> list[Request]:
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2},
        {"frequency_penalty": 0.5},
    ]
    return [
        Request(str(i), tuple(range(3 + i, 20 + 3 * i)), 40, Sampling(seed=i, **(rules[i] | sampling)))
        for i in range(4)
    ]


def logprobs_of(worker: Worker, asked: Request) -> tuple[list[int], list[float]]:
    """The request's tokens and the log-probability of each."""
    values: list[float] = []
    run = worker.run

    def record(plan: StepPlan) -> StepResult:
        result = run(plan)
        values.extend(one.logprob for outcome in result.outcomes for one in outcome.logprobs)
        return result

    worker.run = record  # type: ignore[method-assign]
    try:
        (text,) = Driver(worker, 8).decode([asked], Tally())
    finally:
        worker.run = run  # type: ignore[method-assign]
    return text, values[: len(text)]


def test_mask_rows_change_no_token_and_no_logprob(folder: Path) -> None:
    plain, probing = make(folder, with_drafts=False), make(folder)
    for asked in requests(logprobs=0):
        text, values = logprobs_of(plain, asked)
        probed_text, probed_values = logprobs_of(probing, asked)
        assert probed_text == text
        assert len(values) == 40
        assert probed_values == pytest.approx(values, abs=1e-5)


def test_the_embedded_model_drafts_its_own_text() -> None:
    prompts = ["copy: 4 7 1 9 ->", "reverse: 3 8 5 ->", "sort: 9 2 6 4 ->"]
    worker, plain = make("braid-tiny"), make("braid-tiny", with_drafts=False)
    tokenizer = Tokenizer.from_file(str(resolve_model("braid-tiny") / "tokenizer.json"))
    asked = [
        Request(str(i), tuple(tokenizer.encode(text).ids), 12, Sampling(temperature=(0.0, 0.7)[i % 2], seed=i))
        for i, text in enumerate(prompts)
    ]
    tally = Tally()
    assert Driver(worker, 8).decode(asked, tally) == Driver(plain, 0).decode(asked, Tally())
    assert tally.accepted > 0


def test_a_mask_row_sees_its_whole_block_and_answers_for_its_own_position(folder: Path) -> None:
    """The oracle runs the same rows over pages of its own, the masks as a block that sees itself."""
    worker, seen = make(folder), list[tuple[int, Tensor]]()
    assert worker._speculator is not None
    (drafter,) = worker._speculator._drafters  # type: ignore[attr-defined]
    propose = drafter.propose

    def record(wants: list[Want], depth: int) -> Any:
        seen.extend((len(want.tokens), want.probed) for want in wants if want.probed is not None)
        return propose(wants, depth)

    drafter.propose = record
    (text,) = Driver(worker, 8).decode(requests()[:1], Tally())
    tokens = [*requests()[0].prompt, *text]
    assert len(seen) > 5
    model = load_model(folder, ReferenceOps(), torch.float32, CPU)
    for length, hidden in seen:
        start = length - 1
        runner = PagedRunner(model, ReferenceOps(), 1, 128)
        runner.run([(0, 0, tokens[:start])])
        assert start + len(hidden) == (start // BLOCK + 1) * BLOCK
        (expected,) = runner.run([(0, start, [MASK] * len(hidden))], mask_block=BLOCK)
        assert torch.allclose(model.logits(hidden), expected, atol=1e-4)


def span_of(sequences: Sequences, start: int, tokens: tuple[int, ...], **fields: Any) -> tuple[Span, Any]:
    sampling = Sampling(temperature=0.0)
    speculation = fields.pop("speculation", Speculation())
    state = sequences.admit(start, Request("x", (5,) * (start + 1), 99, sampling, speculation=speculation), 64)
    read = Read.VERIFY if len(tokens) > 1 else Read.SAMPLE
    judged = tuple(range(len(tokens)))
    return Span(start, tokens, start, start + len(tokens), judged=judged, read=read, **fields), state


def test_the_rows_asked_for_stand_behind_the_span() -> None:
    sequences = Sequences()
    span, state = span_of(sequences, 18, (5, 6, 7), num_drafts=8, num_masks=3)
    (probe,) = BlockProber(MASK, BLOCK).probes([span], [state])
    assert probe.at == 0
    assert probe.span == Span(18, (MASK,) * 3, 21, 24, BLOCK)


def test_only_rows_that_decide_a_token_are_followed_by_masks() -> None:
    sequences = Sequences()
    plain, plain_state = span_of(sequences, 17, (5,), num_drafts=8)
    asks, asks_state = span_of(sequences, 18, (5,), num_drafts=8, num_masks=4)
    chunk_state = sequences.admit(30, Request("x", (5,) * 40, 99), 64)
    chunk = Span(30, (5,) * 10, 0, 10, num_drafts=8, num_masks=4)
    probes = BlockProber(MASK, BLOCK).probes([plain, chunk, asks], [plain_state, chunk_state, asks_state])
    assert [probe.at for probe in probes] == [2]


VOCAB = 40


def offer_of(logits: Tensor, last: int, **asked: Any) -> tuple[Any, Any]:
    """What is made of mask rows with these logits, the first of them at the last token."""
    model = TinyModel(VOCAB)
    model.head = torch.eye(VOCAB)
    verify = asked.pop("verify", VerifyMode.COUPLED)
    request = Request("x", (5, 6, 7, last), 50, Sampling(**asked), speculation=Speculation(verify=verify))
    state = Sequences().admit(1, request)
    want = Want(1, state, list(request.prompt), 8, probed=logits)
    return DiffusionDrafter(model, model.ops, mask_id=9).propose([want], 0)[0], state


def rows(*best: int) -> Tensor:
    return torch.stack([4.0 * torch.nn.functional.one_hot(torch.tensor(token), VOCAB) for token in best]).float()


def test_the_drafts_are_the_rows_after_the_last_token_s_own() -> None:
    offer, state = offer_of(rows(8, 20, 21, 22), last=8, temperature=0.0)
    assert offer.tokens == (20, 21, 22)
    # Of 38 others at logit 0: the mask token is banned.
    chance = math.exp(4) / (math.exp(4) + 38)
    assert offer.survivals == pytest.approx([chance, chance**2, chance**3])
    assert state.draft_q is None


def test_a_block_that_guessed_another_text_is_not_offered() -> None:
    assert offer_of(rows(8, 20, 21), last=11, temperature=0.0)[0] is None
    assert offer_of(rows(8, 20, 21) * float("nan"), last=8, temperature=0.0)[0] is None


def test_the_mask_token_is_never_a_draft() -> None:
    offer, _ = offer_of(rows(8, 9, 9), last=8, temperature=0.0)
    assert 9 not in offer.tokens


def test_sampled_drafts_follow_the_target_s_noise_unless_verification_forbids_it() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    last = int(logits[0].argmax())
    coupled, state = offer_of(logits.clone(), last, temperature=1.0, seed=5)
    again, _ = offer_of(logits.clone(), last, temperature=1.0, seed=5)
    assert coupled.tokens == again.tokens
    assert state.draft_q is None
    free, state = offer_of(logits.clone(), last, temperature=1.0, seed=5, verify=VerifyMode.REJECTION)
    assert free.tokens != coupled.tokens
    assert state.draft_q.shape == (5, VOCAB)
    assert torch.allclose(state.draft_q.sum(dim=1), torch.ones(5))
    expected = torch.softmax(logits[1:].index_fill(1, torch.tensor([9]), float("-inf")), dim=1)
    assert torch.allclose(state.draft_q, expected)


def test_a_model_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model is not dual-mode"):
        make(write_tiny_checkpoint(tmp_path / "plain"))
    assert VOCAB_SIZE > MASK
