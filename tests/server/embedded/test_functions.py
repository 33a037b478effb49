"""The functions of the training text do what their names say: the text is imported as a module and called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from server.embedded import functions

CASES: list[tuple[str, tuple[Any, ...], Any]] = [
    ("fibonacci", (10,), 55),
    ("fibonacci_list", (6,), [0, 1, 1, 2, 3, 5]),
    ("factorial", (5,), 120),
    ("is_prime", (97,), True),
    ("is_prime", (91,), False),
    ("is_prime", (1,), False),
    ("primes_up_to", (20,), [2, 3, 5, 7, 11, 13, 17, 19]),
    ("gcd", (12, 18), 6),
    ("lcm", (4, 6), 12),
    ("power", (2, 10), 1024),
    ("reverse_string", ("abc",), "cba"),
    ("is_palindrome", ("level",), True),
    ("count_vowels", ("Hello",), 2),
    ("count_words", ("a b c",), 3),
    ("word_frequencies", ("a b a",), {"a": 2, "b": 1}),
    ("char_count", ("aab",), {"a": 2, "b": 1}),
    ("capitalize_words", ("ab cd",), "Ab Cd"),
    ("remove_spaces", ("a b",), "ab"),
    ("is_anagram", ("abc", "cab"), True),
    ("caesar_cipher", ("xyZ a", 3), "abC d"),
    ("binary_search", ([1, 3, 5, 7], 5), 2),
    ("binary_search", ([1, 3], 2), -1),
    ("linear_search", ([4, 2], 2), 1),
    ("bubble_sort", ([3, 1, 2],), [1, 2, 3]),
    ("insertion_sort", ([3, 1, 2],), [1, 2, 3]),
    ("quick_sort", ([3, 1, 2, 3],), [1, 2, 3, 3]),
    ("merge_sort", ([3, 1, 2],), [1, 2, 3]),
    ("merge", ([1, 4], [2, 3]), [1, 2, 3, 4]),
    ("sum_list", ([1, 2, 3],), 6),
    ("average", ([1, 2, 3],), 2),
    ("median", ([3, 1, 2],), 2),
    ("median", ([4, 1, 2, 3],), 2.5),
    ("find_max", ([1, 5, 2],), 5),
    ("find_min", ([4, 1, 2],), 1),
    ("remove_duplicates", ([1, 2, 1],), [1, 2]),
    ("flatten", ([[1], [2, 3]],), [1, 2, 3]),
    ("chunk", ([1, 2, 3], 2), [[1, 2], [3]]),
    ("rotate", ([1, 2, 3], 1), [2, 3, 1]),
    ("reverse_list", ([1, 2],), [2, 1]),
    ("is_sorted", ([1, 2, 2],), True),
    ("is_sorted", ([2, 1],), False),
    ("cumulative_sum", ([1, 2, 3],), [1, 3, 6]),
    ("dot_product", ([1, 2], [3, 4]), 11),
    ("transpose", ([[1, 2], [3, 4]],), [[1, 3], [2, 4]]),
    ("is_even", (4,), True),
    ("is_odd", (4,), False),
    ("square", (3,), 9),
    ("cube", (2,), 8),
    ("add", (2, 3), 5),
    ("subtract", (2, 3), -1),
    ("multiply", (2, 3), 6),
    ("divide", (6, 3), 2),
    ("maximum", (2, 3), 3),
    ("absolute", (-2,), 2),
    ("clamp", (12, 0, 10), 10),
    ("sum_digits", (123,), 6),
    ("is_leap_year", (1900,), False),
    ("is_leap_year", (2000,), True),
    ("fizzbuzz", (3,), None),
    ("collatz", (6,), [6, 3, 10, 5, 16, 8, 4, 2, 1]),
    ("divisors", (6,), [1, 2, 3, 6]),
    ("celsius_to_fahrenheit", (100,), 212),
    ("fahrenheit_to_celsius", (32,), 0),
    ("to_binary", (5,), "101"),
    ("hello", ("Ada",), None),
    ("hello_world", (), None),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path: Path = tmp_path_factory.mktemp("functions") / "embedded_functions.py"
    path.write_bytes(functions.SOURCE.read_bytes())
    spec = importlib.util.spec_from_file_location("embedded_functions", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(("name", "arguments", "expected"), CASES)
def test_a_function_of_the_training_text_is_right(
    module: ModuleType, name: str, arguments: tuple[Any, ...], expected: object
) -> None:
    function: Callable[..., object] = getattr(module, name)
    assert function(*arguments) == expected


def test_every_function_is_covered() -> None:
    assert set(functions.parse_functions()) - {name for name, _, _ in CASES} == {"read_lines"}


def test_read_lines_reads_lines(module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("a\nb\n", encoding="utf-8")
    assert module.read_lines(path) == ["a", "b"]
