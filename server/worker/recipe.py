"""What a request's `Sampling` asks of its logits, worked out once when the sequence is admitted.

A step then sees only flags and ready arrays: a row pays for the features it uses and nothing for the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from scheduler.types import EosRule, Request, Sampling

GREEDY_BELOW = 1e-2
"""Temperatures below this are greedy: dividing by them could only overflow, not choose differently."""
NEVER_ENDS = 1 << 40
"""Output tokens that no request has."""


class Feature(IntFlag):
    """What a row needs beyond temperature."""

    NONE = 0
    BIAS = 1
    PENALTY = 2
    MIN_TOKENS = 4
    ALLOWED = 8
    BAD_WORDS = 16
    GRAMMAR = 32
    MIN_P = 64
    TOP = 128


FILTERS = int(Feature.MIN_P | Feature.TOP)
"""Features that cut the tail, as a plain integer like `Recipe.features`."""
CONSTRAINED = Feature.MIN_TOKENS | Feature.ALLOWED | Feature.BAD_WORDS | Feature.GRAMMAR
"""Features that ban tokens outright, so that a row may be left with none."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One sequence's sampling rules in the form `process_logits` reads.

    features     its `Feature`s as a plain integer: a step joins those of all rows, and an enum takes 1 us for each
    temperature  1 for greedy rows
    seed         the 64-bit seed as a signed integer
    end_ids      EOS and stop ids: masked until `min_tokens` are out
    min_tokens   the sampling's; more than there can be if the request's diffusion never ends early
    bias_ids     distinct: a token named twice gets the sum
    bad_words    (tokens that must come before, token that is then banned)
    """

    sampling: Sampling
    features: int
    is_greedy: bool
    temperature: float
    seed: int
    end_ids: NDArray[np.int64]
    min_tokens: int
    stop_ids: tuple[int, ...]
    bias_ids: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    allowed_ids: NDArray[np.int64]
    bad_words: tuple[tuple[list[int], int], ...]

    @property
    def counts_prompt(self) -> bool:
        return self.sampling.repetition_penalty != 1.0


def make_recipe(request: Request, eos_ids: tuple[int, ...]) -> Recipe:
    """The recipe of a request; eos_ids are the model's."""
    sampling = request.sampling
    is_greedy = sampling.temperature < GREEDY_BELOW
    bias: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    return Recipe(
        sampling=sampling,
        features=int(_features(sampling, is_greedy, sampling.min_tokens > 0 or _never_ends(request))),
        is_greedy=is_greedy,
        temperature=1.0 if is_greedy else sampling.temperature,
        seed=(sampling.seed + (1 << 63)) % (1 << 64) - (1 << 63),
        end_ids=_ids({*eos_ids, *request.stop_ids}),
        min_tokens=NEVER_ENDS if _never_ends(request) else sampling.min_tokens,
        stop_ids=request.stop_ids,
        bias_ids=_ids(bias),
        bias_values=np.asarray(list(bias.values()), dtype=np.float32),
        allowed_ids=_ids(set(sampling.allowed_token_ids or ())),
        bad_words=tuple((list(word[:-1]), word[-1]) for word in sampling.bad_words if word),
    )


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.asarray(list(ids), dtype=np.int64)


def _never_ends(request: Request) -> bool:
    return request.decoding is not None and request.decoding.eos is EosRule.NEVER


def _features(sampling: Sampling, is_greedy: bool, bans_end: bool) -> Feature:
    penalised = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
    wanted = {
        Feature.BIAS: bool(sampling.logit_bias),
        Feature.PENALTY: penalised,
        Feature.MIN_TOKENS: bans_end,
        Feature.ALLOWED: sampling.allowed_token_ids is not None,
        Feature.BAD_WORDS: bool(sampling.bad_words),
        Feature.GRAMMAR: sampling.grammar is not None,
        # The best token survives both, so a greedy row does not ask for them.
        Feature.MIN_P: sampling.min_p > 0 and not is_greedy,
        Feature.TOP: (sampling.top_k > 0 or sampling.top_p < 1.0) and not is_greedy,
    }
    features = Feature.NONE
    for feature, is_wanted in wanted.items():
        if is_wanted:
            features |= feature
    return features
