"""How the tokens of a request are chosen. Part of the vocabulary: `scheduler.types` hands it on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output: `source` is JSON text (schema, or list of choices), a regex or a Lark grammar."""

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the judged rows of one sequence become tokens. Every field is valid on arrival: the edge has checked it.

    temperature     0 = greedy
    top_k           0 = off
    seed            64-bit key of the noise (R5); requests without one get a random key before they get here
    sample_index    which of the `n` samples of one prompt this is; part of the noise counter
    min_tokens      EOS and stop ids are masked until this many tokens are out
    logprobs        None = off, k = the sampled token's and the k best alternatives' (raw distribution, float32)
    prompt_logprobs as logprobs, for the prompt's own tokens; such a request takes no prefix-cache hits
    bad_words       token-id sequences that must not appear
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    seed: int = 0
    sample_index: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def needs_tokens(self) -> bool:
        """What is sampled must be seen on the host before the next token can be."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.grammar is not None or bool(self.bad_words) or penalties != (1.0, 0.0, 0.0)
