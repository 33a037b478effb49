"""`python -m server bench parallel`: what fixing several tokens at once costs in quality, by policy, against theory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from server.bench.client import BenchError
from server.bench.parallel import picture, report
from server.bench.parallel.cases import DETERMINISTIC, RANDOM, TASKS, Case, make_cases
from server.bench.parallel.decoder import Decoder
from server.bench.parallel.measure import Answer, Figures, summarise
from server.bench.parallel.sweep import Setting, read_settings


class Decodes(Protocol):
    """What `measure` needs of an engine; `decoder.Decoder` is one."""

    def answer(self, cases: Sequence[Case], setting: Setting) -> list[Answer]: ...


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. 0 = measured; 1 = measured, and with --check a statement was not shown.

    Raises BenchError for a model, policy or task that cannot be had.
    """
    if arguments.plot is not None:
        picture.require_matplotlib()
    tasks = read_tasks(arguments.tasks)
    with Decoder(arguments.model, arguments.max_seqs) as decoder:
        settings = read_settings(arguments.policies, decoder.diffusion)
        cases = {task: make_cases(task, arguments.cases, arguments.seed, decoder.num_tokens) for task in tasks}
        figures, refused = measure(decoder, settings, cases, bool(arguments.policies), arguments.no_progress)
    print(report.as_table(figures))
    print()
    for problem in refused:
        print(f"not measured: {problem}")
    found = report.verdicts(figures)
    for verdict in found:
        print(verdict)
    if arguments.json is not None:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        report.write_json(arguments.json, figures, shown)
    if arguments.plot is not None:
        picture.draw(arguments.plot, figures, f"{arguments.model}, {arguments.cases} cases a task")
        print(f"plot: {arguments.plot}")
    return 1 if arguments.check and not all(verdict.holds for verdict in found) else 0


def read_tasks(asked: Sequence[str]) -> list[str]:
    """Names of tasks, or `deterministic` or `random` for those; [] = all. Raises BenchError for another name."""
    groups = {"deterministic": DETERMINISTIC, "random": RANDOM}
    names: list[str] = []
    for name in asked or TASKS:
        if name not in (*groups, *TASKS):
            raise BenchError(f"task {name!r} is none of {', '.join((*groups, *TASKS))}")
        names += groups.get(name, (name,))
    return list(dict.fromkeys(names))


def measure(
    decoder: Decodes, settings: Sequence[Setting], cases: dict[str, list[Case]], is_asked: bool, is_quiet: bool = False
) -> tuple[list[Figures], list[str]]:
    """All settings on all tasks, tasks of one temperature together; and why what was not measured was not.

    is_asked  these settings were asked for by name: then one that the engine refuses is an error (BenchError)
    """
    groups = [[task for task in names if task in cases] for names in (DETERMINISTIC, RANDOM)]
    groups = [group for group in groups if group]
    figures: list[Figures] = []
    refused: list[str] = []
    total = len(settings) * sum(len(cases[task]) for group in groups for task in group)
    with tqdm(total=total, unit="case", disable=is_quiet or None) as bar:
        for setting in settings:
            bar.set_postfix_str(setting.label, refresh=False)
            for group in groups:
                try:
                    figures += _measure(decoder, setting, [cases[task] for task in group])
                except BenchError as problem:
                    if is_asked:
                        raise
                    refused.append(str(problem))
                bar.update(sum(len(cases[task]) for task in group))
    return figures, list(dict.fromkeys(refused))


def _measure(decoder: Decodes, setting: Setting, tasks: Sequence[list[Case]]) -> list[Figures]:
    """One call for all of them: the larger the crowd, the better a step is filled."""
    answers = iter(decoder.answer([case for cases in tasks for case in cases], setting))
    return [summarise(setting, cases, [next(answers) for _ in cases]) for cases in tasks]
