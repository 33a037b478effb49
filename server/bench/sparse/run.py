"""`python -m server bench sparse`: what is still found when each row reads a part of its keys, and how much faster."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from scheduler.attention import AttentionOffer
from scheduler.types import AttentionMethod
from server.bench.client import BenchError
from server.bench.sparse import picture, report
from server.bench.sparse.answers import RetrievalEngine
from server.bench.sparse.measure import DENSE, PER_CONTEXT, Accuracy, Answers, Speed, ask, race
from server.embedded.pairs import NUM_KEYS, PAIR_LEN

CALIBRATED = Path(__file__).resolve().parents[2] / "embedded" / "braid-tiny-retrieval-calibration"


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. 0 = measured, and everything that was asked of it holds; 1 = measured, and not.

    Raises BenchError for a model, a length or a file that does not do.
    """
    if arguments.plot is not None:
        picture.require_matplotlib()
    check_lengths(arguments.lengths)
    methods = arguments.methods or list(AttentionMethod)
    calibration = arguments.calibration or sorted(CALIBRATED.glob("*.*"))
    longest = max(arguments.lengths) + arguments.speed_tokens + 2
    with RetrievalEngine(
        arguments.model, methods, calibration, arguments.channels, arguments.label_dtype, longest
    ) as engine:
        budgets, refused = choose_budgets(arguments.lengths, arguments.share, engine.offers)
        accuracies, speeds = measure(engine, budgets, arguments)
    print(report.as_table(accuracies, speeds))
    for problem in refused:
        print(f"not measured: {problem}")
    if arguments.json is not None:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        shown["calibration"] = [str(file) for file in calibration]
        report.write_json(arguments.json, accuracies, speeds, shown)
    if arguments.plot is not None:
        picture.draw(arguments.plot, accuracies, speeds, f"{arguments.model}, 1/{arguments.share} of the keys")
        print(f"plot: {arguments.plot}")
    is_lost = arguments.min_accuracy is not None and min(one.share for one in accuracies) < arguments.min_accuracy
    return 1 if is_lost else 0


def check_lengths(lengths: list[int]) -> None:
    """Raises BenchError for contexts that no pairs make."""
    for length in lengths:
        if length % PAIR_LEN or not PER_CONTEXT * PAIR_LEN <= length <= NUM_KEYS * PAIR_LEN:
            raise BenchError(
                f"--lengths has {length}, but must have multiples of {PAIR_LEN} from {PER_CONTEXT * PAIR_LEN} to "
                f"{NUM_KEYS * PAIR_LEN}"
            )


def choose_budgets(
    lengths: list[int], share: int, offers: tuple[AttentionOffer, ...]
) -> tuple[dict[int, dict[str, int]], list[str]]:
    """By length and method the keys a row may read, dense first; and why a method is left out somewhere."""
    budgets: dict[int, dict[str, int]] = {}
    refused = []
    for length in lengths:
        budgets[length] = {DENSE: length}
        for offer in offers:
            if length // share >= offer.least_budget:
                budgets[length][offer.method.value] = length // share
            else:
                refused.append(
                    f"{offer.method.value} at {length} keys: 1/{share} of them is {length // share}, it needs "
                    f"{offer.least_budget}"
                )
    return budgets, refused


def measure(
    engine: Answers, budgets: dict[int, dict[str, int]], arguments: argparse.Namespace
) -> tuple[list[Accuracy], list[Speed]]:
    """Accuracy at every length, then speed."""
    accuracies: list[Accuracy] = []
    speeds: list[Speed] = []
    contexts = -(-arguments.questions // PER_CONTEXT)
    with tqdm(total=len(budgets) * contexts, unit="context", disable=arguments.no_progress or None) as bar:
        for length, of_method in budgets.items():
            found: list[Accuracy] = []
            for found in ask(engine, length, arguments.questions, of_method, arguments.seed):
                bar.set_postfix_str(f"{length} keys, dense {found[0].share:.1%}", refresh=False)
                bar.update()
            accuracies += found
    if arguments.rounds:
        for length, of_method in tqdm(budgets.items(), desc="speed", disable=arguments.no_progress or None):
            speeds += race(
                engine,
                length,
                arguments.streams,
                arguments.speed_tokens,
                arguments.rounds,
                of_method,
                arguments.seed,
            )
    return accuracies, speeds
