"""The worker's reader on these kernels: the rules, filters and draws of a whole step give the reference's tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kernels.ops import Ops
from kernels.reference import ReferenceOps
from kernels.triton.ops import TritonOps
from scheduler.types import Request, Sampling
from server.worker.judged import Judged
from server.worker.process_logits import JudgedRow, process_logits
from server.worker.recipe import make_recipe
from server.worker.sampling import read_tokens
from server.worker.sequences import Counts

VOCAB = 70
SAMPLINGS = [
    Sampling(temperature=0.0, top_k=3, logit_bias=((5, 4.0), (69, 3.0))),
    Sampling(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2, top_p=0.8),
    Sampling(min_tokens=9, bad_words=((7,), (8,)), top_k=12, min_p=0.02),
    Sampling(temperature=1.7, allowed_token_ids=tuple(range(1, 70, 3)), top_k=9, top_p=0.9),
    Sampling(),
]


def judged() -> list[Judged]:
    found = []
    for index, sampling in enumerate(SAMPLINGS):
        recipe = make_recipe(Request("r", (5, 6), 99, replace(sampling, seed=index), (2,)), (2,))
        counts = Counts(np.asarray([5, 6, 11]), np.asarray([0, 0, 3], dtype=np.float32))
        found.append(Judged([JudgedRow(recipe, [5, 6, 11, 11, 11], 3, counts)]))
    return found


def test_a_step_of_all_rules_reads_the_references_tokens() -> None:
    logits = torch.randn(len(SAMPLINGS), VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    back_ends: list[Ops] = [TritonOps(num_programs=1), ReferenceOps()]
    processed = [logits.clone() for _ in back_ends]
    rows = [row for one in judged() for row in one.rows]
    for ops, own in zip(back_ends, processed, strict=True):
        assert process_logits(ops, own, rows) == {}
    assert torch.equal(*processed)
    assert int(processed[0].isneginf().sum()) > 100
    first, second = (read_tokens(ops, logits.clone(), judged()) for ops in back_ends)
    assert first == second
