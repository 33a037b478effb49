"""What a model is calibrated on: texts as token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.bench.client import BenchError
from server.embedded import corpus, pairs
from server.text.tokenizer import Tokenizer

PAIRS, STDLIB = "pairs", "stdlib"


def texts(name: str, tokenizer: Tokenizer, seed: int, length: int, tail: int) -> Iterator[Sequence[int]]:
    """Texts without end or as many as there are.

    name          `pairs`: contexts of the embedded retrieval model, each `length` tokens long, of which the last `tail`
                  are questions with their answers; `stdlib`: Python's standard library; otherwise a UTF-8 file
    length, tail  multiples of the length of a pair
    Raises BenchError for a file that cannot be read, or lengths that no context has.
    """
    if name == PAIRS:
        if length % pairs.PAIR_LEN or tail % pairs.PAIR_LEN or not 0 < tail <= length // 2:
            raise BenchError(
                f"contexts of {length} tokens with {tail} of questions cannot be made of pairs of 4 tokens"
            )
        rng = random.Random(f"calibration:{seed}")
        while True:
            yield _recited(rng, length, tail)
    elif name == STDLIB:
        for text in corpus.stdlib_texts():
            yield tokenizer.encode(text, add_special_tokens=False)
    else:
        try:
            yield tokenizer.encode(Path(name).read_text(encoding="utf-8"), add_special_tokens=False)
        except (OSError, UnicodeDecodeError) as problem:
            raise BenchError(f"corpus {name!r} is neither {PAIRS} nor {STDLIB} nor a text file: {problem}") from None


def _recited(rng: random.Random, length: int, tail: int) -> list[int]:
    questions = pairs.draw_questions(rng, length - tail, tail // pairs.PAIR_LEN)
    context = questions[0].prompt[:-1]
    return [*context, *(token for question in questions for token in (question.prompt[-1], *question.answer))]
