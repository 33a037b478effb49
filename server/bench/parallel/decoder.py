"""The engine as the bench sees it: cases in, answers with the steps they were made in out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from scheduler.types import DiffusionModel, Snapshot
from server.bench.client import BenchError
from server.bench.parallel.cases import RANDOM, Case
from server.bench.parallel.measure import Answer
from server.bench.parallel.sweep import Setting
from server.engine.config import SpeculationConfig
from server.engine.offline import Completion, Engine, GenerationError

MAX_TOKENS = 24
"""The longest right answer is 9 tokens; one that has not ended by then is wrong."""

NO_LIMIT = 1 << 40


def plain_name(model: str) -> str:
    """A server's second name of a model, under which it denoises, is no other model."""
    return model if Path(model).is_dir() else model.removesuffix("-diffusion")


class Decoder:
    """One model of this process, by any setting. Raises BenchError if the model cannot be loaded or cannot denoise."""

    diffusion: DiffusionModel

    def __init__(self, model: str, max_seqs: int = 64) -> None:
        try:
            self._engine = Engine(
                plain_name(model),
                max_seqs=max_seqs,
                max_queued_requests=NO_LIMIT,
                max_queued_tokens=NO_LIMIT,
                speculation=SpeculationConfig(mode="off"),
            )
        except (ValueError, OSError) as problem:
            raise BenchError(str(problem)) from problem
        if self._engine.info.diffusion is None:
            self._engine.close()
            raise BenchError(f"{model} does not denoise, it only generates token by token")
        self.diffusion = self._engine.info.diffusion

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._engine.close()

    def num_tokens(self, text: str) -> int:
        return len(self._engine.tokenizer.encode(text))

    def answer(self, cases: Sequence[Case], setting: Setting) -> list[Answer]:
        """All cases at once. Greedy for deterministic tasks; random ones at temperature 1, each with its own seed, so
        that the noise of one says nothing about another's.

        Raises BenchError if the engine refuses the setting.
        """
        decoding = None if setting.decoding is None else replace(setting.decoding, snapshots=True)
        prompts = [self._engine.tokenizer.encode(case.example.prompt) for case in cases]
        try:
            completions = self._engine.generate(
                prompts,
                MAX_TOKENS,
                decoding=decoding,
                temperature=1.0 if cases[0].task in RANDOM else 0.0,
                seeds=[case.seed for case in cases],
            )
        except (ValueError, GenerationError) as problem:
            raise BenchError(f"{setting.label}: {problem}") from problem
        return [self._answer(one, len(prompt)) for one, prompt in zip(completions, prompts, strict=True)]

    def _answer(self, completion: Completion, prompt_len: int) -> Answer:
        words = tuple(self._engine.tokenizer.decode([token]) for token in completion.tokens)
        if completion.decoding is None:
            return Answer(completion.text, words, len(words))
        steps = steps_of(completion.snapshots, prompt_len, self.diffusion.mask_id)
        return Answer(completion.text, words, completion.decoding.forwards, completion.decoding.commit_passes, steps)


def steps_of(snapshots: Sequence[Snapshot], prompt_len: int, mask_id: int) -> tuple[tuple[int, ...], ...]:
    """Which tokens of the output (offsets from its start) got the form they kept in which step, from the block as it
    stood after each step. Steps that fixed nothing for good are left out."""
    tokens: dict[int, int] = {}
    step_of: dict[int, int] = {}
    for number, snapshot in enumerate(snapshots):
        for position, token in enumerate(snapshot.tokens, snapshot.start):
            if position >= prompt_len and token not in (mask_id, tokens.get(position)):
                step_of[position - prompt_len] = number
            tokens[position] = token
    steps: dict[int, list[int]] = {}
    for offset in sorted(step_of):
        steps.setdefault(step_of[offset], []).append(offset)
    return tuple(tuple(steps[number]) for number in sorted(steps))
