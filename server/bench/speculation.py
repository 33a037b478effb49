"""Does speculation pay? Load x kind of text x policy x temperature, each policy on a real server of its own.

Every round asks all servers for the same texts, one server after another, beginning with another one each time: what
disturbs the machine meets all policies alike, and a round's ratios compare neighbours in time. Equal texts of all
policies are part of the result: a policy that changes one has failed, however fast.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from server.bench import speculation_report as report
from server.bench.client import BenchError, Sample, Target, get_json, stream
from server.bench.spawn import spawned_server
from server.bench.speculation_work import WORKLOADS, Ask, drawn_length

OFF = "off"
REHEARSAL_STREAMS = 8


@dataclass(frozen=True, slots=True)
class Policy:
    """A line of the plot: the server's flags beside those that all servers get."""

    label: str
    flags: str


@dataclass(frozen=True, slots=True)
class Place:
    """A point of the sweep."""

    workload: str
    temperature: float
    streams: int


def read_policy(text: str, drafters: str = "") -> Policy:
    """`off`, `auto` (marginal), `on`, `uniform`, `fixed:4` or `table:1:8,4:4`, on these drafters ("" = the server's).

    Raises BenchError for anything else.
    """
    kind, _, value = text.partition(":")
    label = f"{text} {drafters}".strip()
    common = f"--drafters {drafters}" if drafters else ""
    if drafters and "draft_model" in drafters.split(","):
        common += " --draft-model braid-tiny-draft"
    if text == OFF:
        return Policy(OFF, "--speculation off")
    if text in ("auto", "marginal"):
        return Policy(label, common)
    if text == "on":
        return Policy(label, f"--speculation on {common}")
    if text == "uniform":
        return Policy(label, f"--speculation-policy uniform {common}")
    if kind == "fixed" and value.isdecimal() and int(value) > 0:
        return Policy(label, f"--speculation-policy fixed --num-speculative-tokens {value} {common}")
    if kind == "table" and re.fullmatch(r"\d+:\d+(,\d+:\d+)*", value):
        return Policy(label, f"--speculation-policy table --speculation-table {value} {common}")
    raise BenchError(f"policy {text!r} is none of off, auto, on, uniform, fixed:K, table:STREAMS:K,...")


def read_policies(names: Sequence[str], drafter_sets: Sequence[str]) -> list[Policy]:
    """Every policy on every set of drafters; `off` once and first, asked for or not."""
    found = {OFF: read_policy(OFF)}
    for drafters in drafter_sets or [""]:
        for name in names:
            policy = read_policy(name, drafters)
            found[policy.label] = policy
    return list(found.values())


async def run_texts(
    target: Target, asks: Sequence[Ask], streams: int, place: Place, arguments: argparse.Namespace, model: str
) -> list[Sample]:
    """All of `asks`, `streams` at a time; samples in the order of `asks`."""
    samples: list[Sample | None] = [None] * len(asks)
    left = iter(range(len(asks)))

    async def worker() -> None:
        for i in left:
            body = asks[i].body(model, place.temperature, i, arguments.prediction, arguments.ignore_eos)
            samples[i] = await stream(target, "/v1/completions", body, arguments.timeout_s)

    await asyncio.gather(*(worker() for _ in range(min(streams, len(asks)))))
    return [sample for sample in samples if sample is not None]


class Sweep:
    """All measurements of one run."""

    def __init__(self, servers: dict[str, Target], model: str, arguments: argparse.Namespace) -> None:
        self._servers, self._model, self._arguments = servers, model, arguments
        # Synthetic drafts replay what was seen before: then each text is written once, unmeasured.
        self._rehearses = "--synthetic-acceptance" in (arguments.spawn or "")

    async def measure(self, place: Place, bar: tqdm[Any]) -> list[report.Point]:
        """All policies at one point of the sweep, in rounds."""
        rounds: dict[str, list[report.Round]] = {label: [] for label in self._servers}
        for number in range(self._arguments.rounds):
            asks = self._asks(place, number)
            texts: dict[str, list[str]] = {}
            for label in rotated(list(self._servers), number):
                samples = await self._ask_all(label, place, asks)
                rounds[label].append(report.Round.of(samples, place.streams))
                texts[label] = ["".join(sample.texts) for sample in samples]
                bar.update()
            for label, found in texts.items():
                differing = sum(a != b for a, b in zip(found, texts[OFF], strict=True))
                rounds[label][-1].num_different = differing
        return [
            report.Point.of(place.workload, place.temperature, place.streams, label, rounds[label], rounds[OFF])
            for label in self._servers
        ]

    async def warm_up(self) -> None:
        """Every server sees some of each kind of text, and a crowd, before anything is measured."""
        for workload in self._arguments.workloads:
            place = Place(workload, self._arguments.temperature[0], max(self._arguments.streams))
            for label, target in self._servers.items():
                asks = self._asks(place, -1)[: max(8, place.streams)]
                samples = await run_texts(target, asks, place.streams, place, self._arguments, self._model)
                failed = [sample for sample in samples if not sample.is_complete]
                if failed:
                    raise BenchError(f"the server of {label} failed: {failed[0].status} {failed[0].error}")

    async def _ask_all(self, label: str, place: Place, asks: list[Ask]) -> list[Sample]:
        target = self._servers[label]
        if self._rehearses:
            await run_texts(target, asks, REHEARSAL_STREAMS, place, self._arguments, self._model)
        return await run_texts(target, asks, place.streams, place, self._arguments, self._model)

    def _asks(self, place: Place, number: int) -> list[Ask]:
        """New texts in every round and at every point: what a server has learnt of one is no answer to another."""
        rng = random.Random(f"{self._arguments.seed} {place} {number}")
        count = max(place.streams * self._arguments.requests_per_stream, self._arguments.min_requests)
        asks = [WORKLOADS[place.workload](rng) for _ in range(count)]
        if self._arguments.max_tokens is not None:
            asks = [replace(ask, max_tokens=drawn_length(rng, self._arguments.max_tokens)) for ask in asks]
        return asks


def rotated(labels: list[str], number: int) -> list[str]:
    first = number % len(labels)
    return labels[first:] + labels[:first]


def run(arguments: argparse.Namespace) -> int:
    """Start the servers, sweep, report. 0 = measured; 1 = requests failed, texts differ, or --min-ratio was missed."""
    if arguments.plot is not None:
        report.require_matplotlib()
    policies = read_policies(arguments.policies, arguments.drafters)
    with ExitStack() as stack:
        servers = {}
        for policy in tqdm(policies, desc="servers", disable=arguments.no_progress or None):
            url = stack.enter_context(spawned_server(f"{arguments.spawn or ''} {policy.flags}"))
            servers[policy.label] = Target.parse(url)
        points = asyncio.run(_sweep(servers, arguments))
    print(report.as_table(points))
    print(report.verdict(points))
    if arguments.json is not None:
        report.write_json(arguments.json, points, {policy.label: policy.flags for policy in policies}, arguments)
    if arguments.plot is not None:
        report.draw(arguments.plot, points)
        print(f"plot: {arguments.plot}")
    is_slow = arguments.min_ratio is not None and any(
        point.ratio < arguments.min_ratio for point in points if point.policy.startswith("auto")
    )
    return 1 if is_slow or any(point.failed or point.num_different for point in points) else 0


async def _sweep(servers: dict[str, Target], arguments: argparse.Namespace) -> list[report.Point]:
    _, answer = await get_json(servers[OFF], "/v1/models")
    sweep = Sweep(servers, str(answer["data"][0]["id"]), arguments)
    await sweep.warm_up()
    places = [
        Place(workload, temperature, streams)
        for workload in arguments.workloads
        for temperature in arguments.temperature
        for streams in arguments.streams
    ]
    points: list[report.Point] = []
    total = len(places) * arguments.rounds * len(servers)
    with tqdm(total=total, unit="run", disable=arguments.no_progress or None) as bar:
        for place in places:
            bar.set_postfix_str(f"{place.workload}, T={place.temperature:g}, {place.streams} streams", refresh=False)
            points += await sweep.measure(place, bar)
    return points
