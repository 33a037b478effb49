"""What the worker adds to a forward pass, in microseconds per step: `python -m tests.server.worker.measure`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.select import select_ops
from scheduler.types import Admission, Read, Request, Sampling, Span, StepPlan
from server.worker.batch import build_batch
from server.worker.judged import Judged
from server.worker.process_logits import JudgedRow
from server.worker.recipe import make_recipe
from server.worker.sampling import read_tokens
from server.worker.sequences import SequenceState, TokenCounts
from tests.server.worker.tiny_model import TinyModel, make_worker

VOCAB = 8192
ROWS = (1, 8, 32, 128)
RULES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "top_k + top_p": {"top_k": 40, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1},
    "logprobs 5": {"logprobs": 5},
}


def best_us(run: Callable[[], object], repeats: int = 20) -> float:
    run()
    times = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_at)
    return min(times) * 1e6


def judged_row(number: int, rules: dict[str, object]) -> JudgedRow:
    request = Request(str(number), tuple(range(number, number + 300)), 999, Sampling(seed=number, **rules))  # type: ignore[arg-type]
    recipe = make_recipe(request, (2,))
    counts = TokenCounts(request.prompt, recipe.counts_prompt)
    history = [*request.prompt, *range(number, number + 100)]
    counts.catch_up(history)
    return JudgedRow(recipe, history, 100, counts.after())


def measure_rules() -> None:
    ops = select_ops("cpu", torch.float32, num_threads=1)
    print(f"{'reading, us a step':<24}" + "".join(f"{rows:>8} rows" for rows in ROWS))
    for name, rules in RULES.items():
        figures = []
        for num_rows in ROWS:
            logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 4
            rows = [Judged([judged_row(number, rules)]) for number in range(num_rows)]
            figures.append(best_us(lambda logits=logits, rows=rows: read_tokens(ops, logits.clone(), rows), 10))  # type: ignore[misc]
        print(f"{name:<24}" + "".join(f"{figure:>13.0f}" for figure in figures))


class NoForward(TinyModel):
    """Costs nothing, so that what is left is the worker."""

    def forward(self, tokens_T: Tensor, rows: object, kv: object) -> Tensor:
        return torch.zeros(len(tokens_T), 1)

    def logits(self, hidden_JH: Tensor) -> Tensor:
        return torch.zeros(hidden_JH.shape[0], self.head.shape[0])


def measure_steps() -> None:
    sizes = (*ROWS, 512)
    worker = make_worker(NoForward(64), page_size=32, num_pages=7 * 512, max_seqs=512)
    requests = [Request(str(i), tuple(range(2, 202)), 99, Sampling(temperature=0.0)) for i in range(512)]
    admitted = tuple(Admission(i, request, request.prompt) for i, request in enumerate(requests))
    pages = tuple((i, tuple(range(7 * i, 7 * i + 7))) for i in range(512))
    worker.run(StepPlan(0, (), admitted, pages))
    print(f"\n{'step without a forward, us':<32}" + "".join(f"{size:>5} seqs" for size in sizes))
    table, device = worker._sequences.page_table, torch.device("cpu")

    def decode(i: int) -> Span:
        return Span(i, (7,), 199, 200, judged=(0,), read=Read.SAMPLE)

    def verify(i: int) -> Span:
        return Span(i, (7, 8, 9, 10, 11), 199, 204, judged=(0, 1, 2, 3, 4), read=Read.VERIFY)

    def branching(i: int) -> Span:
        return verify(i)._replace(parents=(-1, 0, 0, 1, 2))

    for name, span in (("decode", decode), ("verify, 4 drafts", verify), ("tree of 4 drafts", branching)):
        totals, batches = [], []
        for size in sizes:
            spans = tuple(span(i) for i in range(size))
            states: list[SequenceState] = [worker._sequences[i] for i in range(size)]
            batches.append(best_us(lambda s=spans, a=states: build_batch(s, a, table, 32, device)))  # type: ignore[misc]
            totals.append(best_us(lambda s=spans: worker.run(StepPlan(1, s))))  # type: ignore[misc]
        for part, figures in (("build_batch", batches), ("run", totals)):
            print(f"{name + ': ' + part:<32}" + "".join(f"{figure:>10.0f}" for figure in figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_rules()
    measure_steps()
