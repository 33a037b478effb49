"""The mistakes that other attention kernels made (`attention.md` 7), and the test that each has here.

Those of sparse attention, which is not here, have their places: whoever builds it names its tests so.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MISTAKES = {
    1: "work split by batch size, or for one-row spans only",
    2: "offsets of 32 bits",
    3: "mask flags of batches instead of rows",
    4: "scratch by sequence or by graph maximum",
    5: "autotuning in the request path",
    6: "a page look-up in the iteration that needs it",
    12: "what nobody wrote, times zero",
    13: "tolerances that let a wrong mask pass",
    14: "fp8 sums over long keys",
    15: "log-sum-exp of two bases merged",
    16: "softcap in the wrong base",
    17: "a tree flag that masks rows without a tree",
}
SPARSE = {
    7: "lists of query heads under grouped heads",
    8: "float32 score matrices larger than what they rank",
    9: "a threshold that nothing reaches",
    10: "calibration that overwrites",
    11: "sparse features beside graphs and pages instead of in them",
}


@pytest.mark.parametrize("number", MISTAKES)
def test_each_mistake_has_a_test_that_carries_its_number(number: int) -> None:
    text = "\n".join(path.read_text() for path in HERE.rglob("test_*.py"))
    named = re.findall(r"def test_mistake_((?:\d+_)(?:and_\d+_)*)", text)
    numbers = {int(digits) for name in named for digits in re.findall(r"\d+", name)}
    assert number in numbers, MISTAKES[number]
    assert not set(MISTAKES) & set(SPARSE)
    assert sorted(MISTAKES | SPARSE) == list(range(1, 18))
