"""Every rule of `process_logits` against a slow oracle on random logits: plain Python, in the documented order."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kernels.reference import ReferenceOps
from scheduler.types import Grammar, GrammarKind, Request, Sampling
from server.worker.grammar import GrammarMask
from server.worker.judged import Judged
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.recipe import make_recipe
from server.worker.sampling import read_tokens
from server.worker.sequences import TokenCounts

OPS = ReferenceOps()
VOCAB = 50
EOS = 2


def mask_of(allowed: Sequence[int]) -> GrammarMask:
    """Allows a fixed set of tokens; complete when it is empty but for the end."""
    bits = np.zeros((VOCAB + 31) // 32, dtype=np.uint32)
    for token in allowed:
        bits[token // 32] |= np.uint32(1 << (token % 32))
    return GrammarMask(bits.view(np.int32), is_complete=list(allowed) == [EOS])


def make_row(
    sampling: Sampling,
    prompt: Sequence[int] = (5,),
    output: Sequence[int] = (),
    stop_ids: tuple[int, ...] = (EOS,),
    grammar: Sequence[int] | None = None,
) -> JudgedRow:
    request = Request("r", tuple(prompt), 99, sampling, stop_ids)
    recipe = make_recipe(request, (EOS,))
    counts = TokenCounts(prompt, recipe.counts_prompt)
    history = [*prompt, *output]
    for end in range(len(prompt), len(history) + 1):
        counts.catch_up(history[:end])
    mask = None if grammar is None else mask_of(grammar)
    return JudgedRow(recipe, history, len(output), counts.after(), mask)


def oracle(logits: Sequence[float], row: JudgedRow, grammar: Sequence[int] | None = None) -> dict[int, float]:
    """{token: logit} of what may be sampled, by the documented order."""
    s, output = row.recipe.sampling, row.history[len(row.history) - row.num_output :]
    left = dict(enumerate(logits))
    for token, bias in s.logit_bias:
        left[token] += bias
    for token in set(row.history):
        value = left[token]
        left[token] = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
    for token, count in Counter(output).items():
        left[token] -= s.frequency_penalty * count + s.presence_penalty
    if len(output) < s.min_tokens:
        for token in {EOS, *row.recipe.stop_ids}:
            left.pop(token, None)
    for word in s.bad_words:
        start = list(word[:-1])
        if not start or list(output[-len(start) :]) == start:
            left.pop(word[-1], None)
    if s.allowed_token_ids is not None:
        left = {token: value for token, value in left.items() if token in s.allowed_token_ids}
    if grammar is not None:
        left = {token: value for token, value in left.items() if token in grammar}
    if s.temperature < 0.01:
        return left
    left = {token: value / s.temperature for token, value in left.items()}
    peak = max(left.values())
    if s.min_p > 0:
        left = {token: value for token, value in left.items() if math.exp(value - peak) >= s.min_p}
    if s.top_k > 0:
        floor = sorted(left.values(), reverse=True)[min(s.top_k, len(left)) - 1]
        left = {token: value for token, value in left.items() if value >= floor}
    if s.top_p < 1:
        total, mass, kept = sum(math.exp(value - peak) for value in left.values()), 0.0, {}
        for token, value in sorted(left.items(), key=lambda item: (-item[1], item[0])):
            if mass >= s.top_p * total:
                break
            kept[token], mass = value, mass + math.exp(value - peak)
        left = kept
    return left


def check(logits: torch.Tensor, rows: Sequence[JudgedRow], grammars: Sequence[Sequence[int] | None]) -> None:
    processed = logits.clone()
    assert process_logits(OPS, processed, rows) == {}
    for index, row in enumerate(rows):
        wanted = oracle(logits[index].tolist(), row, grammars[index])
        kept = (processed[index] > -math.inf).nonzero().squeeze(1).tolist()
        assert kept == sorted(wanted), row.recipe.sampling
        assert processed[index, kept].tolist() == pytest.approx([wanted[token] for token in kept], abs=1e-4)


FEATURES: dict[str, dict[str, object]] = {
    "nothing": {},
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.9},
    "nearly greedy": {"temperature": 1e-3},
    "logit_bias": {"logit_bias": ((3, 5.0), (7, -100.0), (49, 2.5))},
    "logit_bias of one token twice": {"logit_bias": ((3, 5.0), (3, -2.0), (49, 2.5))},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below one": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "all penalties": {"repetition_penalty": 1.2, "presence_penalty": -0.3, "frequency_penalty": 0.9},
    "min_tokens": {"min_tokens": 9},
    "allowed": {"allowed_token_ids": (2, 4, 8, 16, 32)},
    "bad word of one": {"bad_words": ((9,), (10,))},
    "bad words of several": {"bad_words": ((11, 12, 13), (12, 14), (5, 11, 12, 15), (99 - 60, 1))},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "top_k": {"top_k": 7},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "top_k and top_p": {"top_k": 9, "top_p": 0.8},
    "all filters": {"temperature": 1.8, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_rule_alone_and_among_plain_rows_equals_the_oracle(name: str) -> None:
    sampling = Sampling(**FEATURES[name])  # type: ignore[arg-type]
    row = make_row(sampling, prompt=(5, 6, 7, 5), output=(11, 11, 12), stop_ids=(EOS, 30))
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(len(name))) * 3
    check(logits[1:2], [row], [None])
    plain = make_row(Sampling())
    check(logits, [plain, row, make_row(Sampling(temperature=0.0))], [None] * 3)


def random_sampling(rng: random.Random) -> Sampling:
    def maybe(value: object, off: object) -> object:
        return value if rng.random() < 0.4 else off

    ids = rng.sample(range(3, VOCAB), 30)
    return Sampling(
        temperature=maybe(rng.choice([0.0, 0.3, 1.7]), 1.0),  # type: ignore[arg-type]
        top_p=maybe(rng.uniform(0.05, 0.99), 1.0),  # type: ignore[arg-type]
        top_k=maybe(rng.randint(1, 60), 0),  # type: ignore[arg-type]
        min_p=maybe(rng.uniform(0.001, 0.5), 0.0),  # type: ignore[arg-type]
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),  # type: ignore[arg-type]
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),  # type: ignore[arg-type]
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),  # type: ignore[arg-type]
        logit_bias=maybe(tuple((i, rng.uniform(-9, 9)) for i in ids[:5]), ()),  # type: ignore[arg-type]
        allowed_token_ids=maybe(tuple(ids), None),  # type: ignore[arg-type]
        bad_words=maybe((*((i,) for i in ids[:3]), (7, ids[4])), ()),  # type: ignore[arg-type]
        min_tokens=maybe(rng.randint(1, 9), 0),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_mixtures_of_rules_equal_the_oracle_row_by_row(seed: int) -> None:
    rng = random.Random(seed)
    rows, grammars = [], []
    for _ in range(rng.randint(1, 9)):
        grammar = rng.sample(range(VOCAB), 45) if rng.random() < 0.3 else None
        sampling = random_sampling(rng)
        if grammar is not None:
            constrained = Grammar(GrammarKind.REGEX, "x")
            sampling = Sampling(temperature=sampling.temperature, grammar=constrained, top_k=sampling.top_k)
        prompt = rng.choices(range(3, VOCAB), k=rng.randint(1, 20))
        output = rng.choices((7, *range(3, VOCAB)), k=rng.randint(0, 12))
        rows.append(make_row(sampling, prompt, output, grammar=grammar))
        grammars.append(grammar)
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    check(logits, rows, grammars)


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, {2: 1.5, 3: 1.25, 0: 1.05}), (0.7, {2: 1.5, 3: 1.25})])
def test_neighbours_in_the_order_that_do_not_commute_stand_as_documented(top_p: float, kept: dict[int, float]) -> None:
    """bias, penalty, mask, temperature, min_p, top_k, top_p."""
    logits = torch.tensor([[-4.0, 3.9, 3.0, 2.5, 2.0, 1.0, -9.0, -9.0]])
    sampling = Sampling(
        temperature=2.0,
        logit_bias=((0, 8.2),),
        repetition_penalty=2.0,
        allowed_token_ids=(0, 2, 3, 4, 5),
        min_p=0.5,
        top_k=3,
        top_p=top_p,
    )
    process_logits(OPS, logits, [make_row(sampling, prompt=(0,))])
    # Token 0: -4 + 8.2 = 4.2, halved to 2.1; the penalty before the bias would leave -8 + 8.2 = 0.2, and it would go.
    # Token 1 is not allowed; masked after min_p, its 3.9 would have raised the floor above tokens 0, 3 and 4.
    # min_p before the temperature keeps what is within 0.69 of 3.0, which token 0 is not.
    # Of the three best, two have 74 %: enough. Of the four that top_p before top_k would see, they have 59 %.
    found = {token: value for token, value in enumerate(logits[0].tolist()) if value > -math.inf}
    assert found == pytest.approx(kept, abs=1e-6)


def test_equal_logits_at_the_edge_of_top_p_are_kept_by_lowest_id_and_of_top_k_all() -> None:
    logits = torch.zeros(2, VOCAB)
    rows = [make_row(Sampling(top_p=0.1)), make_row(Sampling(top_k=4))]
    process_logits(OPS, logits, rows)
    assert (logits[0] > -math.inf).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]
    assert int((logits[1] > -math.inf).sum()) == VOCAB


def test_top_p_of_a_flat_distribution_over_a_large_vocabulary_sorts_the_whole_row() -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * 0.1
    rows = [make_row(Sampling(top_p=0.9)), make_row(Sampling(top_p=0.01)), make_row(Sampling(top_p=0.5, top_k=2000))]
    check(logits, rows, [None] * 3)


def test_a_complete_grammar_may_end_however_short_the_output() -> None:
    grammar = Grammar(GrammarKind.REGEX, "x")
    row = make_row(Sampling(min_tokens=9, grammar=grammar), grammar=[EOS])
    logits = torch.zeros(1, VOCAB)
    assert process_logits(OPS, logits, [row]) == {}
    assert (logits[0] > -math.inf).nonzero().squeeze(1).tolist() == [EOS]


def test_allowed_ids_and_a_grammar_must_both_allow() -> None:
    sampling = Sampling(allowed_token_ids=(2, 4, 33, 49), grammar=Grammar(GrammarKind.REGEX, "x"))
    rows = [make_row(sampling, grammar=allowed) for allowed in ([4, 9, 33], [5, 6])]
    logits = torch.zeros(3, VOCAB)
    errors = process_logits(OPS, logits, [*rows, make_row(Sampling())])
    assert (logits[0] > -math.inf).nonzero().squeeze(1).tolist() == [4, 33]
    assert errors == {1: "no token is allowed at output position 0 by ALLOWED, GRAMMAR"}
    assert (logits[2] == 0).all()


def test_rows_without_a_rule_come_out_as_they_went_in() -> None:
    logits = torch.randn(2, VOCAB)
    processed = logits.clone()
    process_logits(OPS, processed, [make_row(Sampling()), make_row(Sampling(temperature=0.0))])
    assert torch.equal(processed, logits)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6),
        Sampling(temperature=1.3, top_k=5),
        Sampling(top_p=0.7),
        Sampling(temperature=1.5, min_p=0.1, top_p=0.95, presence_penalty=1.0),
    ],
)
def test_sampled_tokens_follow_the_processed_distribution(sampling: Sampling) -> None:
    """Chi-square at 4,000 draws over positions and seeds; the limit is beyond one false alarm in 10,000 runs."""
    draws = 4000
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    wanted = oracle(logits[0].tolist(), make_row(sampling))
    probability = {token: math.exp(value) for token, value in wanted.items()}
    total = sum(probability.values())
    counts: Counter[int] = Counter()
    for start in range(0, draws, 500):
        rows = []
        for number in range(start, start + 500):
            seeded = Sampling(**{f: getattr(sampling, f) for f in sampling.__slots__} | {"seed": number % 40})
            rows.append(make_row(seeded)._replace(num_output=number // 40))
        readings = read_tokens(OPS, logits.repeat(500, 1), [Judged([row]) for row in rows])
        counts.update(token for reading in readings for token in reading.tokens)
    assert set(counts) <= set(wanted)
    statistic, cells = 0.0, 0
    for token, weight in probability.items():
        expected = draws * weight / total
        if expected >= 5:
            statistic, cells = statistic + (counts[token] - expected) ** 2 / expected, cells + 1
    assert statistic < cells + 4 * math.sqrt(2 * cells)
