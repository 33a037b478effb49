"""Key-value retrieval in text: a context of pairs, then one of its keys; the answer is the key's value.

    k0412 a17 b52 c08 k3311 a60 b02 c33 ... k0412   ->   a17 b52 c08

A pair is four tokens, so a context of 8,192 tokens has 2,048 of them, all with different keys. A value has three
tokens: the first is found while the prompt is read, the others in decode steps, each by looking the key up again.
Nothing but the context tells a value: its tokens are drawn alike and apart.
Task: multi-query associative recall, Arora et al., "Zoology" (2023).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from server.embedded.tokenizer import SPECIAL_TOKENS

NUM_KEYS = 4096
NUM_CHOICES = 64
"""Of each token of a value."""
VALUE_LEN = 3
PAIR_LEN = 1 + VALUE_LEN
UNKNOWN = "<|unknown|>"
FIRST_KEY = len(SPECIAL_TOKENS) + 1
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCAB_SIZE = FIRST_VALUE + VALUE_LEN * NUM_CHOICES
"""Ids: special tokens, `UNKNOWN`, keys, first tokens of values, second, third."""


@dataclass(frozen=True, slots=True)
class Question:
    """A context's tokens with a key behind them, and the value that must follow."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def make_tokenizer() -> Tokenizer:
    """One token a word, words between white space; a word it does not know becomes `UNKNOWN`."""
    words = [f"k{key:04}" for key in range(NUM_KEYS)]
    words += [f"{letter}{choice:02}" for letter in "abc" for choice in range(NUM_CHOICES)]
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL_TOKENS, UNKNOWN)])
    return tokenizer


def draw_pairs(rng: random.Random, num_pairs: int) -> list[tuple[int, ...]]:
    """Token ids of pairs with different keys. Raises ValueError if there are not so many keys."""
    if not 1 <= num_pairs <= NUM_KEYS:
        raise ValueError(f"num_pairs is {num_pairs}, but must be between 1 and {NUM_KEYS}, the number of keys")
    keys = rng.sample(range(FIRST_KEY, FIRST_VALUE), num_pairs)
    return [(key, *_draw_value(rng)) for key in keys]


def _draw_value(rng: random.Random) -> list[int]:
    return [FIRST_VALUE + place * NUM_CHOICES + rng.randrange(NUM_CHOICES) for place in range(VALUE_LEN)]


def draw_questions(rng: random.Random, context_len: int, count: int) -> list[Question]:
    """Questions about one context of `context_len` tokens, whose pairs are asked for at places drawn apart.

    Raises ValueError if context_len is not a whole number of pairs, or a context has fewer pairs than questions.
    """
    if context_len % PAIR_LEN:
        raise ValueError(f"context_len is {context_len}, but must be a multiple of {PAIR_LEN}, the length of a pair")
    pairs = draw_pairs(rng, context_len // PAIR_LEN)
    if count > len(pairs):
        raise ValueError(f"count is {count}, but a context of {context_len} tokens has {len(pairs)} pairs")
    context = tuple(token for pair in pairs for token in pair)
    return [Question((*context, pair[0]), pair[1:]) for pair in rng.sample(pairs, count)]


def is_right(question: Question, tokens: tuple[int, ...]) -> bool:
    """Does an answer begin with the whole value? What follows does not count."""
    return tokens[:VALUE_LEN] == question.answer
