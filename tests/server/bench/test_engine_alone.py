"""The tasks in this process's engine: both ways are asked, and a denoised answer says its forwards."""

from __future__ import annotations

import re

import pytest

from server.bench.diffusion_work import KINDS
from server.bench.engine_alone import main


def test_every_kind_is_timed_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)
    for line in lines:
        tokens, forwards = map(float, re.findall(r"([\d.]+) (?:tokens|forwards)", line))
        assert 1 <= forwards < tokens
