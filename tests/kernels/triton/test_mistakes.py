"""The mistakes that other attention kernels made (`attention.md` 7): each has tests here that carry its number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
MISTAKES = {
    1: "work split by batch size, or for one-row spans only",
    2: "offsets of 32 bits",
    3: "mask flags of batches instead of rows",
    4: "scratch by sequence or by graph maximum",
    5: "autotuning in the request path",
    6: "a page look-up in the iteration that needs it",
    7: "lists of query heads under grouped heads",
    8: "float32 score matrices larger than what they rank",
    9: "a threshold that nothing reaches",
    10: "calibration that overwrites",
    11: "sparse features beside graphs and pages instead of in them",
    12: "what nobody wrote, times zero",
    13: "tolerances that let a wrong mask pass",
    14: "fp8 sums over long keys",
    15: "log-sum-exp of two bases merged",
    16: "softcap in the wrong base",
    17: "a tree flag that masks rows without a tree",
}


@pytest.mark.parametrize("number", MISTAKES)
def test_each_mistake_has_a_test_that_carries_its_number(number: int) -> None:
    text = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    named = re.findall(r"def test_mistake_((?:\d+_)(?:and_\d+_)*)", text)
    numbers = {int(digits) for name in named for digits in re.findall(r"\d+", name)}
    assert number in numbers, MISTAKES[number]
    assert sorted(MISTAKES) == list(range(1, 18))
