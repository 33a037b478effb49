"""A timer for tests of what is made of times."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.gpu_report.timing import Call, Times


class ScriptedTimer:
    """Says that calls took what the test wants, after running them. A list is a call's rounds, a string its failure."""

    is_meaningful = True

    def __init__(self, seconds: Mapping[str, list[float] | str]) -> None:
        self._seconds = seconds
        self.called: list[str] = []

    def time(self, calls: Mapping[str, Call], target_s: float = 0.0) -> dict[str, Times | str]:
        found: dict[str, Times | str] = {}
        for name, call in calls.items():
            call()
            self.called.append(name)
            value = self._seconds.get(name, [1.0, 1.0])
            found[name] = value if isinstance(value, str) else Times(tuple(value))
        return found
