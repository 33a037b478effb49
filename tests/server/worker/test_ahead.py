"""Steps that are begun before the tokens of the one before are on the host, on the real worker: same tokens, with
graphs and without, whatever fails in between; and nothing on the way there waits for the device."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernels.reference import ReferenceOps
from scheduler.scheduler import Scheduler
from scheduler.types import (
    UNKNOWN,
    Delta,
    FinishReason,
    Limits,
    Request,
    Sampling,
    StepPlan,
    TokenLogprob,
)
from server.engine.core import EngineCore
from server.worker import process_logits
from server.worker.ahead_checks import ahead_checks
from server.worker.batch import Batch
from server.worker.graphs import GraphedForward, graph_sizes
from server.worker.judged import Judged
from server.worker.kv_pool import KVPool
from server.worker.process_logits import JudgedRow
from server.worker.recipe import make_recipe
from server.worker.sampling import NOT_FINITE, choose_tokens, read_chosen
from server.worker.transfer import Transfer
from server.worker.worker import Worker
from tests.server.worker.tiny_model import EOS, TinyModel, make_worker

VOCAB = 40
KINDS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_p=0.9, top_k=9),
    Sampling(temperature=1.2, min_p=0.05, logit_bias=((5, 3.0), (9, -100.0))),
    Sampling(temperature=1.0, min_tokens=4),
    Sampling(temperature=1.0, allowed_token_ids=(2, 4, 8, 15, 16, 23)),
    Sampling(temperature=1.0, logprobs=2),
    Sampling(temperature=0.0, logprobs=0),
)
HOSTS = (
    Sampling(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4),
    Sampling(temperature=1.0, bad_words=((7, 8), (9,))),
    Sampling(temperature=1.0, prompt_logprobs=1),
)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def requests(rng: random.Random, count: int, kinds: tuple[Sampling, ...]) -> list[Request]:
    shared = tuple(rng.randrange(3, VOCAB) for _ in range(20))
    made = []
    for i in range(count):
        own = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30)))
        sampling = replace(rng.choice(kinds), seed=rng.getrandbits(60), sample_index=i % 3)
        prompt = shared + own if i % 4 == 0 else own
        stops = (EOS, 11, 30) if i % 2 else ()
        made.append(Request(f"r{i}", prompt, rng.randint(1, 24), sampling, stops, priority=i % 2))
    return made


class Counted:
    """What a run came to."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.ends: dict[str, FinishReason | None] = {}
        self.num_ahead = self.num_surplus = self.num_preempted = self.num_steps = 0


def serve(
    worker: Worker, asked: list[Request], seed: int, limits: Limits, abort: str | None = None, most: int = 3000
) -> Counted:
    """Requests that come one by one while others run. abort: one that leaves after its first token."""
    rng, found = random.Random(seed), Counted()
    core = EngineCore(worker, Scheduler(limits, root=bytes(32)), plans_ahead=worker.plans_ahead)
    waiting = list(reversed(asked))
    while waiting or core.has_work:
        while waiting and rng.random() < 0.5:
            core.add(waiting.pop())
        deltas, stats = core.step()
        for delta in deltas:
            note(found, delta)
            if delta.request_id == abort and delta.finish_reason is None:
                core.abort(delta.request_id)
        if stats is not None:
            found.num_steps += 1
            found.num_ahead += stats.is_ahead
            found.num_surplus += stats.num_surplus
            found.num_preempted += stats.num_preempted
        assert found.num_steps < most
    assert core.stats().pages_used == 0
    return found


def note(found: Counted, delta: Delta) -> None:
    assert found.ends.get(delta.request_id) is None, "news after the end"
    found.tokens.setdefault(delta.request_id, []).extend(delta.tokens)
    found.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
    found.ends[delta.request_id] = delta.finish_reason


def limits_of(num_pages: int = 128, max_seqs: int = 8, rows: int = 48) -> Limits:
    return Limits(rows, max_seqs, 128, num_pages, 8)


def graphed(pool: KVPool, model: TinyModel) -> GraphedForward:
    """As on a GPU, where a recorded forward runs again on the same memory."""

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        return run

    made = GraphedForward(model, None, pool, 33, graph_sizes(16), capture, Transfer(torch.device("cpu")))
    made.capture()
    return made


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_graphed", [False, True], ids=["eager", "graphs"])
def test_planned_ahead_or_not_the_tokens_are_the_same(
    model: TinyModel, seed: int, is_graphed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts in chunks, arrivals at any moment, stop ids, preemption, prefix hits, an abort."""
    asked = requests(random.Random(seed), 14, KINDS)
    limits = limits_of(num_pages=24 if seed % 2 else 128)
    abort = f"r{seed}" if seed % 3 == 0 else None
    plain = serve(make_worker(model, num_pages=limits.num_pages), asked, seed, limits, abort)
    forward = (lambda pool: graphed(pool, model)) if is_graphed else None
    worker = make_worker(model, num_pages=limits.num_pages, graphed=forward, plans_ahead=True)
    found = serve(worker, asked, seed + 100, limits, abort)
    assert not caplog.records, "a step was run again"
    assert not plain.num_ahead
    assert found.num_ahead > found.num_steps // 3
    for request in asked:
        name = request.id
        if name == abort:
            same = min(len(plain.tokens[name]), len(found.tokens[name]))
            assert plain.tokens[name][:same] == found.tokens[name][:same]
        else:
            assert (found.tokens[name], found.ends[name]) == (plain.tokens[name], plain.ends[name])
            # Torch's products depend on the batch in their last bits.
            for one, other in zip(found.logprobs[name], plain.logprobs[name], strict=True):
                assert (one.token, one.rank, len(one.top)) == (other.token, other.rank, len(other.top))
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)
            assert len(found.logprobs[name]) == (0 if request.sampling.logprobs is None else len(found.tokens[name]))
    if not seed % 2:
        assert found.num_surplus > 0


@pytest.mark.parametrize("seed", range(4))
def test_requests_whose_rules_look_at_tokens_wait_for_them(
    model: TinyModel, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests(random.Random(50 + seed), 12, KINDS[:2] + HOSTS)
    plain = serve(make_worker(model), asked, seed, limits_of(max_seqs=3))
    found = serve(make_worker(model, plans_ahead=True), asked, seed, limits_of(max_seqs=3))
    assert (found.tokens, found.ends) == (plain.tokens, plain.ends)
    assert 0 < found.num_ahead < found.num_steps
    assert not caplog.records, "a step was run again"


@pytest.mark.parametrize("at", range(1, 30, 3))
@pytest.mark.parametrize("where", ["forward", "tokens"])
def test_a_step_that_raises_with_another_behind_it_loses_no_token(model: TinyModel, at: int, where: str) -> None:
    """It raises once, in either half: everybody's text is what it would have been."""
    asked = requests(random.Random(3), 8, KINDS)
    plain = serve(make_worker(model), asked, 1, limits_of())
    worker = make_worker(model, plans_ahead=True)
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("a passing fault")

    if where == "forward":
        worker._model = _Failing(model, fails)
    else:
        read = worker._reader.read

        def failing(*arguments: Any) -> Any:
            fails()
            return read(*arguments)

        worker._reader.read = failing  # type: ignore[method-assign, assignment]
    found = serve(worker, asked, 1, limits_of())
    assert calls >= at
    assert (found.tokens, found.ends) == (plain.tokens, plain.ends)


class _Failing:
    def __init__(self, model: TinyModel, fails: Callable[[], None]) -> None:
        self._model, self._fails = model, fails
        self.logits = model.logits

    def forward(self, *arguments: Any) -> Any:
        self._fails()
        return self._model.forward(*arguments)


def test_a_request_that_always_fails_takes_nobody_along(model: TinyModel) -> None:
    """The token that its model cannot bear is sampled on the device, and is seen a step later."""
    asked = requests(random.Random(8), 8, KINDS)
    plain = serve(make_worker(model), asked, 1, limits_of())
    poisoned = max(range(VOCAB), key=lambda token: sum(token in out for out in plain.tokens.values()))

    def check(tokens: torch.Tensor) -> None:
        if bool((tokens == poisoned).any()):
            raise RuntimeError("cannot bear it")

    careful = TinyModel(VOCAB)
    careful.before_forward = check
    alone = serve(make_worker(careful), asked, 1, limits_of())
    found = serve(make_worker(careful, plans_ahead=True), asked, 1, limits_of())
    assert FinishReason.ERROR in found.ends.values()
    assert any(end is not FinishReason.ERROR for end in found.ends.values())
    assert (found.tokens, found.ends) == (alone.tokens, alone.ends)


def test_a_row_that_is_not_finite_fails_its_request_alone(model: TinyModel) -> None:
    asked = requests(random.Random(9), 6, KINDS[:2])
    plain = serve(make_worker(model), asked, 1, limits_of())
    poisoned = TinyModel(VOCAB)
    poisoned.poisoned_token = plain.tokens["r0"][0]
    alone = serve(make_worker(poisoned), asked, 1, limits_of())
    found = serve(make_worker(poisoned, plans_ahead=True), asked, 1, limits_of())
    assert FinishReason.ERROR in found.ends.values()
    assert (found.tokens, found.ends) == (alone.tokens, alone.ends)


def test_a_plan_that_takes_tokens_nobody_chose_is_refused(model: TinyModel) -> None:
    worker = make_worker(model)
    request = Request("r", (5, 6, 7), 4, Sampling(temperature=0.0))
    scheduler = Scheduler(limits_of())
    scheduler.add(request, 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    worker.run(plan)
    after = scheduler.schedule_ahead(0.0)
    assert after is not None
    assert after.spans[0].tokens == (UNKNOWN,)
    with pytest.raises(ValueError, match="not chosen early"):
        worker.run(after)


class NoLook(TorchFunctionMode):
    """Fails where a tensor's values are asked for, which waits for a device."""

    FORBIDDEN = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "any", "equal")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name == "__getitem__":
            index = args[1]
            parts = index if isinstance(index, tuple) else (index,)
            assert not any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in parts)
        return func(*args, **(kwargs or {}))


class Deviceless(ReferenceOps):
    """The back end with its own look at values allowed: what is under test is the worker's way around it."""

    def __init__(self) -> None:
        self._inner = ReferenceOps()

    def truncate(self, *arguments: Any) -> None:
        with looking():
            self._inner.truncate(*arguments)

    def edit_logits(self, *arguments: Any) -> None:
        with looking():
            self._inner.edit_logits(*arguments)

    def sample(self, *arguments: Any) -> torch.Tensor:
        with looking():
            return self._inner.sample(*arguments)


@contextmanager
def looking() -> Iterator[None]:
    with torch._C.DisableTorchFunction():
        yield


def test_choosing_tokens_does_not_look_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where a look would wait. Told afterwards: one row is not finite, and one is empty."""
    monkeypatch.setattr(process_logits, "can_look", lambda logits: False)
    rules = [
        Sampling(temperature=0.0, logprobs=2),
        Sampling(temperature=1.0),
        Sampling(allowed_token_ids=(4,), logit_bias=((4, -torch.inf),)),
    ]
    rows = [JudgedRow(make_recipe(Request("r", (1,), 4, rule), (EOS,)), [1], 0) for rule in rules]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    best, logits_before = int(logits[0].argmax()), logits[0].clone()
    logits[1, 3] = torch.nan
    with NoLook():
        chosen = choose_tokens(Deviceless(), logits, [Judged([row]) for row in rows]).light()
    first, broken, empty = read_chosen(Deviceless(), chosen)
    assert first.tokens == (best,)
    assert first.logprobs == (TokenLogprob(best, first.logprobs[0].logprob, 1, first.logprobs[0].top),)
    assert [token for token, _ in first.logprobs[0].top] == logits_before.topk(2).indices.tolist()
    assert broken.error == NOT_FINITE
    assert empty.error is not None
    assert "ALLOWED" in empty.error


@pytest.mark.parametrize("breaks", [None, "tokens", "wait"])
def test_the_gpus_check_tells_wrong_tokens_and_waits(model: TinyModel, breaks: str | None) -> None:
    """What `gpu_checks` runs, here on a CPU: right where all is right, and not where it is not."""
    worker = make_worker(model, plans_ahead=True)
    fill = worker._ahead.fill

    def wrong(plan: StepPlan, batch: Batch) -> None:
        fill(plan, batch)
        if plan.after is not None:
            batch.tokens.fill_(7)

    if breaks == "tokens":
        worker._ahead.fill = wrong  # type: ignore[method-assign]

    @contextmanager
    def guard() -> Iterator[None]:
        if breaks == "wait":
            raise RuntimeError("called a synchronizing CUDA operation")
        yield

    checks = ahead_checks(worker, 7, 9, guard=guard)
    assert [is_right for _, is_right in checks] == {
        None: [True, True], "tokens": [False, True], "wait": [False, False],
    }[breaks]  # fmt: skip
