"""Requests that come and go between and within steps, some of them poisoned, and what their clients saw."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scheduler.types import Delta, FinishReason
from server.engine.core import EngineCore
from tests.server.engine.fakes import POISON, expected, request, tokens_of


class Crowd:
    """22 requests of 12 tokens for a core; two of them make any step fail that they are in."""

    def __init__(self, core: EngineCore, rng: random.Random) -> None:
        self._core, self._rng = core, rng
        self._prompts = {f"r{i}": tuple(rng.randrange(400) for _ in range(rng.randint(1, 40))) for i in range(20)}
        self._prompts |= {f"bad{i}": (*self._prompts[f"r{i}"], POISON) for i in range(2)}
        self._waiting, self._aborted = list(self._prompts), set[str]()
        rng.shuffle(self._waiting)
        self._deltas: dict[str, list[Delta]] = {name: [] for name in self._prompts}

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self._core.has_work

    def come_and_go(self) -> None:
        while self._waiting and self._rng.random() < 0.6:
            name = self._waiting.pop()
            self._core.add(request(name, self._prompts[name], 12))
        here = sorted(set(self._prompts) - set(self._waiting) - self._aborted)
        if self._rng.random() < 0.1 and here:
            self._aborted.add(name := self._rng.choice(here))
            self._core.abort(name)

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self._aborted, "an aborted request said something"
            self._deltas[delta.request_id].append(delta)

    def check(self) -> None:
        """Everybody got the text of a request alone, the poisoned ones an error, and no page is kept."""
        for name, prompt in self._prompts.items():
            if name in self._aborted:
                continue
            if name.startswith("bad"):
                assert [delta.finish_reason for delta in self._deltas[name]] == [FinishReason.ERROR]
            else:
                assert tokens_of(self._deltas[name]) == expected(prompt, 12)
                assert self._deltas[name][-1].finish_reason is FinishReason.LENGTH
        assert self._core.stats().pages_used == 0
