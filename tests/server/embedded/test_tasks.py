"""The generated tasks: every checker takes right answers and refuses wrong ones, and a seed fixes the data."""

from __future__ import annotations

import ast
import random

import pytest

from server.embedded import functions, tasks
from server.embedded.tasks import IM_END, Example


def _answer(example: Example) -> str:
    return example.answer.removesuffix(IM_END)


@pytest.mark.parametrize("task", sorted(tasks.MAKERS))
def test_a_checker_takes_the_generated_answer(task: str) -> None:
    for index in range(200):
        example = tasks.make_example(task, random.Random(index))
        assert tasks.check(example, _answer(example)), example


@pytest.mark.parametrize("task", sorted(tasks.MAKERS))
def test_a_checker_refuses_more_less_and_nothing(task: str) -> None:
    for index in range(50):
        example = tasks.make_example(task, random.Random(index))
        answer = _answer(example)
        assert not tasks.check(example, ""), example
        assert not tasks.check(example, answer.rstrip()[:-1] + "~"), example
        assert not tasks.check(example, answer.rstrip() + " 1"), example


@pytest.mark.parametrize(
    ("task", "prompt", "right", "wrong"),
    [
        ("insert-random", "insert 5: 7 3 9 ->", [" 5 7 3 9\n", " 7 3 9 5"], [" 7 3 9", " 7 3 5 5 9", " 5 3 7 9"]),
        ("remove-random", "remove: 7 3 9 ->", [" 3 9", " 7 9", " 7 3\n"], [" 7 3 9", " 9 7", " 3"]),
        (
            "replace-random",
            "replace by Eva: Ada Bob Leo ->",
            [" Eva Bob Leo", " Ada Bob Eva"],
            [" Ada Bob Leo", " Eva Eva Leo"],
        ),
        ("shuffle", "shuffle: 7 3 9 ->", [" 9 3 7", " 3 7 9\n"], [" 7 3 9", " 9 9 7", " 7 3"]),
    ],
)
def test_a_random_task_takes_every_right_answer_and_no_wrong_one(
    task: str, prompt: str, right: list[str], wrong: list[str]
) -> None:
    example = Example(task, prompt, right[0])
    assert [tasks.check(example, text) for text in right] == [True] * len(right)
    assert [tasks.check(example, text) for text in wrong] == [False] * len(wrong)


def test_json_is_compared_by_value() -> None:
    example = Example("json", "record: Ada is 31 and lives in Rome ->", ' {"name": "Ada", "age": 31, "city": "Rome"}\n')
    assert tasks.check(example, '{"city":"Rome","age":31,"name":"Ada"}')
    assert not tasks.check(example, '{"city":"Rome","age":"31","name":"Ada"}')
    assert not tasks.check(example, '{"city":"Rome","age":31,"name":"Ada"')


def test_numbers_sort_by_value_and_names_by_the_alphabet() -> None:
    assert tasks.sort_items(["10", "9", "2"]) == ["2", "9", "10"]
    assert tasks.sort_items(["Bob", "Ada"]) == ["Ada", "Bob"]


def test_the_same_seed_draws_the_same_examples() -> None:
    first, second, other = (
        [tasks.draw_example(rng) for _ in range(30)] for rng in (random.Random(1), random.Random(1), random.Random(2))
    )
    assert first == second
    assert first != other


def test_a_list_checker_refuses_a_prompt_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="not a list prompt"):
        tasks.check(Example("copy", "copy 1 2", " 1 2"), " 1 2")


def test_every_function_and_every_variation_is_valid_python() -> None:
    texts = functions.parse_functions()
    assert len(texts) >= 40
    rng = random.Random(0)
    for text in texts.values():
        assert not isinstance(ast.parse(functions.drop_docstring(text)).body[0], ast.Expr)
        assert '"""' not in functions.drop_docstring(text)
        for _ in range(20):
            (node,) = ast.parse(functions.vary(text, rng)).body
            assert isinstance(node, ast.FunctionDef)


def test_a_function_example_reads_as_one_text_when_joined() -> None:
    rng = random.Random(3)
    texts = list(functions.parse_functions().values())
    plain = [e for e in (functions.draw_function(texts, rng) for _ in range(200)) if not e.prompt.startswith("<")]
    assert len(plain) > 100
    for example in plain:
        assert isinstance(ast.parse(example.prompt + example.answer).body[0], ast.FunctionDef), example
