"""Steps in two halves on a device that computes beside the host: what happens in between changes no token."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from scheduler.types import StepPlan, StepResult
from server.engine.link import Abort, Add, FromEngine, Stop, Update, client_codec
from server.engine.runner import Core, Loop
from server.engine.several import SeveralCores
from tests.server.engine.crowd import Crowd
from tests.server.engine.fakes import FakeWorker, expected, fake_core, request


class Device(FakeWorker):
    """A worker whose steps run beside the host. events: what the host did, in order; "launch" and "collect" with the
    step's number. late: a step that raises does so when it is collected, as on a GPU, and not when it is launched.
    most: steps that may be under way at once.
    """

    def __init__(
        self, events: list[tuple[str, int]] | None = None, late: bool = False, model: str = "", most: int = 1
    ) -> None:
        super().__init__(model=model)
        self.most = most
        self.is_asynchronous = True
        self.events = events if events is not None else []
        self.in_flight = 0
        self._late = late

    def run(self, plan: StepPlan) -> StepResult:
        """A step again, or a part of it: what was launched behind it is void."""
        self.in_flight = 0
        return super().run(plan)

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.events.append(("launch", plan.step))
        self.in_flight += 1
        assert self.in_flight <= self.most, "a step was launched before the last one was collected"
        result: StepResult | Exception
        try:
            result = super().run(plan)
        except (RuntimeError, IndexError) as error:
            if not self._late:
                self.in_flight -= 1
                raise
            result = error

        def finish() -> StepResult:
            self.in_flight -= 1
            self.events.append(("collect", plan.step))
            if isinstance(result, Exception):
                raise result
            return result

        return finish


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_come_and_go_while_a_step_runs_change_no_text(seed: int) -> None:
    """Poisoned ones too, whichever half of the step says so; every page is free in the end."""
    rng = random.Random(seed)
    worker = Device(late=bool(seed % 2))
    core = fake_core(worker)
    crowd = Crowd(core, rng)
    while crowd.has_work:
        crowd.come_and_go()
        plan = core.plan()
        out = core.take_outbox()
        if plan is not None:
            core.launch(plan)
            crowd.come_and_go()
            more, _ = core.collect()
            out += more
        crowd.take(out)
    crowd.check()


class Recording(Loop):
    """Notes when it sends tokens and when it takes messages in."""

    def __init__(self, endpoint: str, events: list[tuple[str, int]]) -> None:
        super().__init__(endpoint, delta_interval_s=0.0, step_timeout_s=60.0)
        self._events = events

    def send(self, message: FromEngine) -> None:
        if isinstance(message, Update):
            self._events += [("send", stats.step) for stats in message.steps]
        super().send(message)

    def _drain(self, core: Core) -> None:
        self._events.append(("drain", 0))
        super()._drain(core)


def serve(core: Core, events: list[tuple[str, int]], folder: Path, names: list[str]) -> dict[str, list[int]]:
    """The tokens of some requests that a client sends to the loop, one after another's first token."""
    endpoint, context = f"ipc://{folder}/link", zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.bind(endpoint)
    loop = Recording(endpoint, events)
    thread = threading.Thread(target=loop.run, args=(core,), daemon=True)
    thread.start()
    codec, tokens, todo = client_codec(), dict[str, list[int]](), list(names)
    is_open = set(names)
    deadline = time.monotonic() + 60

    def say(message: Add | Abort | Stop) -> None:
        socket.send(codec.encode(message))

    say(Add(request(name := todo.pop(0), (len(name), 7), 10)))
    while is_open:
        assert socket.poll(1000 * max(0, int(deadline - time.monotonic()))), "the loop is silent"
        message = codec.decode(socket.recv())
        assert isinstance(message, Update)
        for delta in message.deltas:
            if delta.request_id not in tokens and todo:
                say(Add(request(name := todo.pop(0), (len(name), 7), 10)))
            tokens.setdefault(delta.request_id, []).extend(delta.tokens)
            if delta.finish_reason is not None:
                is_open.discard(delta.request_id)
    say(Stop())
    thread.join(60)
    assert not thread.is_alive()
    loop.close()
    socket.close(linger=0)
    context.term()
    return tokens


@pytest.mark.parametrize("num_models", [1, 2])
def test_the_loop_sends_and_listens_while_the_device_computes(num_models: int, tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []
    alone = fake_core(Device(events))
    core = alone if num_models == 1 else SeveralCores({"": alone, "b": fake_core(Device(events, model="b"))})
    names = ["a", "bb", "ccc"]
    tokens = serve(core, events, tmp_path, names)
    assert tokens == {name: expected((len(name), 7), 10) for name in names}
    steps = [step for what, step in events if what == "launch"]
    assert steps == [step for what, step in events if what == "collect"]
    for step in steps:
        begin, end = events.index(("launch", step)), events.index(("collect", step))
        assert ("drain", 0) in events[begin:end], "what arrives waits for the step"
        if step > steps[0]:
            assert ("send", step - 1) in events[begin:end], "the last step's tokens hold the device up, or wait for it"


def test_a_step_of_the_cpu_is_sent_as_soon_as_it_is_over(tmp_path: Path) -> None:
    """There is nobody to compute meanwhile: tokens do not wait for the next step to be planned."""
    events: list[tuple[str, int]] = []

    class Plain(Device):
        def __init__(self) -> None:
            super().__init__(events)
            self.is_asynchronous = False

    assert serve(fake_core(Plain()), events, tmp_path, ["a"]) == {"a": expected((1, 7), 10)}
    for step in [step for what, step in events if what == "collect"]:
        after = events[events.index(("collect", step)) + 1 :]
        assert after[0] == ("send", step)
