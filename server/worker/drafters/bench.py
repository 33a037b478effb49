"""What lookup drafters cost: `python -m server.worker.drafters.bench` prints the table of README.md."""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np

from scheduler.types import Request, Sampling, Speculation
from server.worker.drafters.base import RowTops, Want
from server.worker.drafters.lookup import LookupDrafter, Store
from server.worker.drafters.speculator import Speculator
from server.worker.drafters.stores.adjacency import AdjacencyStore
from server.worker.drafters.stores.grammar import GrammarStore
from server.worker.drafters.stores.history import HistoryStore
from server.worker.drafters.stores.ngram_prob import NgramProbStore
from server.worker.drafters.stores.prediction import PredictionStore
from server.worker.drafters.stores.suffix import SuffixStore
from server.worker.drafters.stores.trigram import TrigramStore
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState

VOCAB = 8192
REPEATS = 5


def code_like(num_tokens: int, seed: int) -> list[int]:
    """A text whose phrases recur with changes, as in edited code: 40 phrases of 3 to 30 tokens."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(VOCAB) for _ in range(rng.randrange(3, 30))] for _ in range(40)]
    text: list[int] = []
    while len(text) < num_tokens:
        text += rng.choice(phrases)
        if rng.random() < 0.3:
            text[-1] = rng.randrange(VOCAB)
    return text[:num_tokens]


def make_want(text: list[int], end: int, seq_id: int, state: SequenceState, tree: bool) -> Want:
    return Want(seq_id, state, text[:end], 16 if tree else 8, _tops(text, end - 2, end), tree)


def _tops(text: list[int], start: int, end: int) -> RowTops:
    """Rows that gave text[start:end]: the right token first, nine others behind it."""
    ids = np.array([[(text[at] + i * at) % VOCAB for i in range(10)] for at in range(start, end)], dtype=np.int32)
    row = np.log([0.55, *([0.05] * 9)]).astype(np.float32)
    return RowTops(tuple(range(start, end)), ids, np.tile(row, (end - start, 1)))


def make_state(text: list[int], num_prompt: int, seq_id: int, temperature: float = 0.7) -> SequenceState:
    speculation = Speculation(prediction=tuple(text[num_prompt:]))
    request = Request(str(seq_id), tuple(text[:num_prompt]), 4096, Sampling(temperature), speculation=speculation)
    return SequenceState(request, make_recipe(request, ()), 0, list(text), 0)


def microseconds(make_store: Callable[[], Store], text: list[int], num_prompt: int, tree: bool) -> tuple[float, float]:
    """(first call with the whole prompt to learn, median of a call per step of 2 tokens), best of REPEATS."""
    first, typical = [], []
    for seq_id in range(REPEATS):
        drafter, state, times = LookupDrafter(make_store()), make_state(text, num_prompt, seq_id), []
        for end in range(num_prompt, len(text), 2):
            wants = [make_want(text, end, seq_id, state, tree)]
            started_at = time.thread_time()
            drafter.propose(wants, 0)
            times.append(1e6 * (time.thread_time() - started_at))
        first.append(times[0])
        typical.append(sorted(times[1:])[len(times) // 2])
    return min(first), min(typical)


def composite_microseconds(suffix: SuffixStore, text: list[int], num_seqs: int) -> float:
    """Median cost per sequence of a `Speculator` of the default drafters in steps of 2 tokens."""
    stores: list[Store] = [PredictionStore(), GrammarStore(), suffix]
    speculator = Speculator([LookupDrafter(store) for store in stores], VOCAB, False, False)
    states = [make_state(text, 1000, 10**7 + seq_id) for seq_id in range(num_seqs)]
    times = []
    for end in range(1000, len(text), 2):
        wants = [make_want(text, end, 10**7 + seq_id, state, False) for seq_id, state in enumerate(states)]
        started_at = time.thread_time()
        speculator.propose(wants, 0)
        times.append(1e6 * (time.thread_time() - started_at) / num_seqs)
    return sorted(times)[len(times) // 2]


def warm_suffix(texts: Sequence[list[int]]) -> SuffixStore:
    store = SuffixStore(HistoryStore(), 256 << 20)
    for seq_id, text in enumerate(texts):
        store.release(seq_id, make_state(text, 1, seq_id))
        while store.work(1 << 12):
            pass
    return store


def per_token(store: SuffixStore, text: list[int]) -> float:
    """Microseconds of one token of a finished output that `suffix` learns."""
    store.release(10**6, make_state(text, 1, 10**6))
    started_at = time.thread_time()
    while store.work(1 << 12):
        pass
    return 1e6 * (time.thread_time() - started_at) / len(text)


def bytes_held(store: Store, text: list[int]) -> tuple[float, float]:
    """(measured, as the store says) bytes per token of a text of its own."""
    want = make_want(text, len(text), 1, make_state(text, 1, 1), False)._replace(tops=_tops(text, 1, len(text)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    store.learn(want, 1 << 20)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held / len(text), store.num_bytes / len(text)


def main() -> None:
    texts = [code_like(1500, seed) for seed in range(20)]
    shared = warm_suffix(texts)
    stores: dict[str, Callable[[], Store]] = {
        "prediction": PredictionStore,
        "history": HistoryStore,
        "suffix, 30,000 tokens": lambda: shared,
        "adjacency": lambda: AdjacencyStore(64 << 20),
        "trigram": lambda: TrigramStore(64 << 20),
        "ngram_prob": lambda: NgramProbStore(64 << 20),
    }
    out = sys.stdout.write
    out("| store | first call, 1,000 tokens | chain of 8 | tree of 16 |\n| --- | --- | --- | --- |\n")
    for name, make_store in stores.items():
        cells = [microseconds(make_store, texts[0], 1000, tree) for tree in (False, True)]
        out(f"| `{name}` | {cells[0][0]:.0f} us | {cells[0][1]:.1f} us | {cells[1][1]:.1f} us |\n")
    rng = random.Random(99)
    composite = [composite_microseconds(shared, texts[0], num) for num in (1, 8, 32)]
    out(f"the default drafters, a sequence of 1, 8, 32 together: {', '.join(f'{cost:.1f} us' for cost in composite)}\n")
    fresh = [rng.randrange(VOCAB) for _ in range(1500)]
    for name, text in (("new", fresh), ("familiar", code_like(1500, 3)), ("monotonous", [5] * 1500)):
        out(f"`suffix`, {name} text: {per_token(warm_suffix(texts), text):.2f} us a token learnt\n")
    for name in ("history", "adjacency", "trigram", "ngram_prob"):
        real, told = bytes_held(stores[name](), fresh)
        out(f"`{name}`: holds {real:.0f} bytes for each token of a new text, says {told:.0f}\n")


if __name__ == "__main__":
    main()
