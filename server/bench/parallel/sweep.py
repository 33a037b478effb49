"""What is measured: every policy of the catalogue, and for each the values of the one setting that trades speed for
quality. What the catalogue gains is measured without a change here, at its defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.policies import POLICIES, BadPolicy, make_diffusion
from scheduler.types import Diffusion, DiffusionModel
from server.bench.client import BenchError

STEPS = "steps"
"""Not a parameter of a method but the field of that name: the masks of a block are spread over so many steps."""

SWEEPS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "auto": ("threshold", (0.8, 0.9, 0.95)),
    "low_confidence": (STEPS, (8, 4, 2, 1)),
    "random": (STEPS, (8, 4, 2, 1)),
    "origin": (STEPS, (8, 4, 2, 1)),
    "maskgit_plus": (STEPS, (4, 2)),
    "topk_margin": (STEPS, (8, 4, 2)),
    "entropy": (STEPS, (8, 4, 2, 1)),
    "threshold": ("threshold", (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)),
    "factor": ("factor", (0.25, 0.5, 1.0, 2.0)),
    "localleap": ("threshold", (0.8, 0.9, 0.95)),
    "dparallel": ("entropy", (0.1, 0.3, 0.5, 1.0)),
    "entropy_bounded": ("gamma", (0.05, 0.15, 0.35, 0.7)),
    "sdar_dynamic": ("threshold", (0.7, 0.85, 0.95)),
    "llada2_edit": ("threshold", (0.5, 0.7, 0.9)),
    "hierarchy": ("low", (0.4, 0.6, 0.8)),
    "wino": ("wide", (0.6, 0.7, 0.8)),
    "learn2pd": ("threshold", (0.5, 0.8, 0.96)),
    "prophet": ("late", (2.5, 5.0, 7.5)),
    "adablock": ("selector.threshold", (0.7, 0.9)),
    "dsb": ("threshold", (0.7, 0.9)),
    "fast_dllm_v2": ("sub_block", (2, 4)),
    "fast_dllm_v2_cache": ("sub_block", (2, 4)),
}

# How a selector's choice of positions relates to what the step draws there.
BY_PLACE = ("sequential", "random", "origin")
BY_DISTRIBUTION = ("topk_margin", "entropy", "entropy_threshold", "entropy_bounded")
# The policy with the same order of positions that can be made to fix one token a step.
ONE_BY_ONE = {"random": "random", "topk_margin": "topk_margin", "entropy": "entropy"}
ONE_BY_ONE |= {"entropy_threshold": "entropy", "entropy_bounded": "entropy"}
REVISES = ("edit", "wino")


@dataclass(frozen=True, slots=True)
class Setting:
    """A point of a line of the plot. `decoding` None = token by token."""

    policy: str
    label: str
    decoding: Diffusion | None = None
    value: float | None = None


AUTOREGRESSIVE = Setting("autoregressive", "autoregressive")
SEQUENTIAL = "sequential"


def read_settings(asked: Sequence[str], model: DiffusionModel) -> list[Setting]:
    """`threshold` (its values of `SWEEPS`) or `threshold:0.5,0.9`; [] = every policy that this topology has.

    `autoregressive` (of a model that can) and `sequential` come first, asked for or not: others are compared with them.
    Raises BenchError for a policy or a value that cannot be had.
    """
    names = list(asked) or [name for name, p in POLICIES.items() if p.topology in (None, model.topology)]
    found = {AUTOREGRESSIVE.label: AUTOREGRESSIVE} if model.is_dual else {}
    for text in (SEQUENTIAL, *names):
        name, _, values = text.partition(":")
        for setting in _settings(name, values, model):
            found[setting.label] = setting
    return list(found.values())


def _settings(name: str, values: str, model: DiffusionModel) -> list[Setting]:
    parameter, numbers = SWEEPS.get(name, ("", ()))
    if values:
        if not parameter:
            raise BenchError(f"policy {name!r} is swept over nothing, so write it without a colon")
        try:
            numbers = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise BenchError(f"policy {name}:{values} is not like threshold:0.5,0.9") from None
    try:
        if not numbers:
            return [Setting(name, name, make_diffusion(name, model.topology))]
        return [_setting(name, parameter, number, model) for number in numbers]
    except BadPolicy as problem:
        raise BenchError(f"policy {name!r}: {problem}") from problem


def _setting(name: str, parameter: str, number: float, model: DiffusionModel) -> Setting:
    if parameter != STEPS:
        decoding = make_diffusion(name, model.topology, values={parameter: number})
        return Setting(name, f"{name} {number:g}", decoding, number)
    if number != int(number) or number < 1:
        raise BenchError(f"policy {name}:{number:g}: steps are whole numbers from 1")
    decoding = make_diffusion(name, model.topology, steps=int(number))
    return Setting(name, f"{name} steps={number:g}", decoding, number)
