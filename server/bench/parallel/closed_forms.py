"""What a perfect model scores on the random list tasks when several positions of an answer are drawn at once.

Perfect: at every step it draws each chosen position from the exact distribution given what is fixed, independently of
the others drawn in that step. Whatever it gets wrong is then the price of parallelism, and of nothing else. The order
of the positions must not depend on what is drawn (`sequential`, `random`, `origin`); for selectors that look at the
distributions see `laws.py`.

A partition is a list of steps, each the answer's item positions (from 0) that it fixes. Source: diffusion reference,
section 11, generalised from equal steps of left-to-right positions to any partition, and for `shuffle` to the law that
the task has: any order but the one given. `tests/server/bench/parallel` compares all of it with enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Partition = Sequence[Sequence[int]]


def replace_accuracy(num_items: int, partition: Partition) -> float:
    """One of `num_items` places, each as likely, gets the new item. Right: exactly one did."""
    chance, left, result = 1.0, num_items, 0.0
    for step in partition:
        k = len(step)
        # Found in this step, once: all that is left is certain to be kept. Not found: on with fewer places.
        result += chance * (k / left) * (1 - 1 / left) ** (k - 1)
        chance *= (1 - 1 / left) ** k
        left -= k
        if not left:
            break
    return result


def permutation_accuracy(num_items: int, partition: Partition) -> float:
    """Any order of `num_items` different items, each as likely. Right: no item twice."""
    left, result = num_items, 1.0
    for step in partition:
        result *= math.perm(left, len(step)) / left ** len(step)
        left -= len(step)
    return result


def shuffle_accuracy(num_items: int, partition: Partition) -> float:
    """Any order but the given one, each as likely. Right: no item twice, and not the given order.

    As long as every fixed place kept its item, `num_items - fixed` items may stand in (m! - 1) orders, (m - 1)! - 1 of
    which keep a given item at its place and (m - 1)! of which put a given other one there. Once one place differs, the
    rest is a plain permutation.
    """
    sizes = [len(step) for step in partition]
    left, same, result = num_items, 1.0, 0.0
    for number, k in enumerate(sizes):
        orders = math.factorial(left) - 1
        if orders <= 0:  # one item left and all others kept: the exact distribution never comes here
            break
        keeps, moves = (math.factorial(left - 1) - 1) / orders, math.factorial(left - 1) / orders
        rest = permutation_accuracy(left - k, [range(size) for size in sizes[number + 1 :]])
        for kept in range(k):
            ways = math.comb(k, kept) * _moved(k - kept, left - kept)
            result += same * ways * keeps**kept * moves ** (k - kept) * rest
        same *= keeps**k
        left -= k
    return result


def _moved(places: int, items: int) -> int:
    """In how many ways so many places get different ones of `items` items, none its own (each place has one there)."""
    return sum((-1) ** i * math.comb(places, i) * math.perm(items - i, places - i) for i in range(places + 1))


def remove_accuracy(num_items: int, partition: Partition) -> float:
    """One of `num_items` items, each as likely, is left out. Right: one was.

    Answer position j has item j if a later one is left out, else item j + 1: which one is left out is an interval that
    every drawn position narrows, and several at once must agree on it.
    """
    return _interval_accuracy(0, num_items, [sorted(step) for step in partition], has_mark=False)


def insert_accuracy(num_items: int, partition: Partition) -> float:
    """A new item is put at one of `num_items + 1` places, each as likely. Right: once, all else in order.

    Answer position j has item j if the place is behind it, the new item if it is the place, else item j - 1.
    """
    return _interval_accuracy(0, num_items + 1, [sorted(step) for step in partition], has_mark=True)


def _interval_accuracy(low: int, high: int, steps: list[list[int]], has_mark: bool) -> float:
    """The place is in [low, high), each as likely; position j says whether it is behind j, before it, or (has_mark)
    at j. Without marks, "at j" and "before j" look the same."""
    if high - low == 1 or not steps:
        return 1.0
    size = high - low
    at = 1 / size if has_mark else 0.0
    positions, rest = steps[0], steps[1:]

    def behind(j: int) -> float:
        return min(max(high - 1 - j, 0), size) / size

    def mark(j: int) -> float:
        return at if low <= j < high else 0.0

    total = 0.0
    for cut in range(len(positions) + 1):
        left, right = positions[:cut], positions[cut:]
        chance = math.prod(behind(j) for j in left) * math.prod(1 - behind(j) - mark(j) for j in right)
        if chance > 0:
            new_low = max(low, left[-1] + 1) if left else low
            new_high = min(high, right[0] + (0 if has_mark else 1)) if right else high
            # Two neighbours that say "between us" leave no place at all: drawn apart, they can.
            if new_low < new_high:
                total += chance * _interval_accuracy(new_low, new_high, rest, has_mark)
        if has_mark and right:
            found = math.prod(1 - behind(j) - mark(j) for j in right[1:])
            total += math.prod(behind(j) for j in left) * mark(right[0]) * found
    return total


CLOSED_FORMS: dict[str, Callable[[int, Partition], float]] = {
    "replace-random": replace_accuracy,
    "shuffle": shuffle_accuracy,
    "remove-random": remove_accuracy,
    "insert-random": insert_accuracy,
}


def answer_length(task: str, num_items: int) -> int:
    """Items of an answer to a list of `num_items`."""
    change = {"insert": 1, "insert-random": 1, "remove": -1, "remove-random": -1}
    return num_items + change.get(task, 0)
