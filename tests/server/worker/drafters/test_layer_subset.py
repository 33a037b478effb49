"""Drafts by some of the target's own layers: exact whatever runs, all accepted when all run, and what is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling
from server.embedded.measure_drafters import Driver, Tally
from server.models.layers import Decoder
from server.models.loading import load_model
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.config import SpeculatorConfig
from server.worker.drafters.layer_choice import Exit, LayerChoice, Search, Uniform, evenly, make_choice, text_to_score
from server.worker.drafters.layer_subset import SCORE_EVERY, LayerSubsetDrafter, build_layer_subset
from server.worker.kv_pool import KVPool
from server.worker.worker import Worker
from tests.server.worker.drafters.model_rig import CPU, Sequences, want
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoint

LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("deep"), "qwen3", num_hidden_layers=LAYERS)


def make(folder: Path, source: str | None, stop: str = "fixed") -> Worker:
    asked = None
    if source is not None:
        asked = SpeculatorConfig(drafters=("layer_subset",), layer_subset=source, draft_stop=stop)
    return build_worker(
        WorkerConfig(str(folder), "float32", "cpu", kv_cache_bytes=4 << 20, num_threads=1, speculation=asked), False
    )


def requests() -> list[Request]:
    return [
        Request(
            str(i),
            tuple(range(3 + i, 20 + 3 * i)),
            40,
            Sampling(temperature=(0.0, 0.7, 1.3, 1.0)[i], seed=i, top_p=0.9),
        )
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[int]]:
    return Driver(make(folder, None), 0).decode(requests(), Tally())


@pytest.mark.parametrize("source", ["uniform:0.0", "uniform:0.4", "search", "exit"])
def test_the_text_is_that_of_plain_decoding_whatever_layers_draft(
    folder: Path, plain: list[list[int]], source: str
) -> None:
    tally = Tally()
    assert Driver(make(folder, source), 4).decode(requests(), tally) == plain
    assert tally.drafted > 0
    if source == "uniform:0.0":
        # All layers draft: every draft is the target's own token (the last step may end before its drafts do).
        assert tally.accepted == tally.drafted


def test_a_subset_is_chosen_evenly_and_keeps_the_first_and_the_last_layer() -> None:
    assert evenly(8, 0.5) == (0, 2, 5, 7)
    assert evenly(5, 0.4) == (0, 2, 4)
    assert evenly(12, 0.25) == (0, 1, 3, 4, 5, 7, 8, 10, 11)
    assert evenly(4, 0.99) == (0, 3)
    assert evenly(1, 0.5) == (0,)
    for num_layers in range(1, 40):
        for share in (0.0, 0.1, 0.3, 0.5, 0.8):
            layers = evenly(num_layers, share)
            skipped = min(round(share * num_layers), max(0, num_layers - 2))
            assert len(layers) == num_layers - skipped
            assert {0, num_layers - 1} <= set(layers)


@pytest.mark.parametrize("source", ["uniform", "uniform:1", "uniform:x", "uniform:-0.1", "both"])
def test_a_source_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="layer_subset is"):
        make_choice(source, 4, 8)


def test_the_search_finds_the_subset_that_agrees_most() -> None:
    choice, best = Search(8, 4), (0, 1, 6, 7)
    assert len(choice.layers) == len(best)
    trials = 0
    while (candidate := choice.candidate()) is not None and trials < 2000:
        trials += 1
        assert len(candidate) == len(best)
        assert {0, 7} <= set(candidate)
        common = len(set(candidate) & set(best))
        choice.learn(candidate, 8 * common, 40)
    assert choice.layers == best
    assert trials < 2000


def test_the_exit_weighs_acceptance_against_layers_run() -> None:
    """Golden values of tokens per layer: a perfect second layer, useless others; then only the last but one is good."""
    choice = Exit(8, most_drafts=6)
    for _ in range(40):
        for _ in range(7):
            candidate = choice.candidate()
            assert candidate is not None
            choice.learn(candidate, 40 if len(candidate) >= 2 else 0, 40)
    assert choice.layers == (0, 1)
    assert choice.most_drafts == 6
    assert choice.tokens_per_layer(2, 6) == pytest.approx(7 / 20, rel=0.02)
    late = Exit(8, most_drafts=6)
    for _ in range(40):
        for _ in range(7):
            candidate = late.candidate()
            assert candidate is not None
            late.learn(candidate, 36 if len(candidate) >= 3 else 4, 40)
    assert late.layers == (0, 1, 2)
    assert late.tokens_per_layer(3, 2) == pytest.approx((1 - 0.9**3) / 0.1 / 14, rel=0.02)


def test_the_longest_output_is_scored_from_where_it_begins() -> None:
    assert text_to_score([(range(10), 9), (range(50), 30)], 64) == (list(range(50)), 30)
    assert text_to_score([(range(100), 30)], 64) == (list(range(36, 100)), 1)
    assert text_to_score([(range(100), 90)], 64) == (list(range(36, 100)), 54)
    assert text_to_score([(range(10), 8)], 64) is None


class Rig:
    """A drafter over a target whose keys are counted; `forwards` holds the rows of each of its forwards."""

    def __init__(self, folder: Path, source: str) -> None:
        self.sequences = Sequences()
        model = load_model(folder, ReferenceOps(), torch.float32, CPU)
        assert isinstance(model, Decoder)
        self.model = model
        self.pool = KVPool(
            ReferenceOps(), model.config, self.sequences.num_pages, self.sequences.page_size, torch.float32, CPU
        )
        self.drafter: LayerSubsetDrafter = build_layer_subset(
            model, model.config, source, self.pool, self.sequences.table, ReferenceOps(), VOCAB_SIZE, 256, 4, "fixed"
        )

    @property
    def choice(self) -> LayerChoice:
        return self.drafter._chosen.choice

    def keys(self) -> Tensor:
        return torch.stack([torch.stack(layer) for layer in self.pool.layers]).clone()


def test_nothing_is_written_before_the_last_token_s_position(folder: Path) -> None:
    rig = Rig(folder, "search")
    asked = Request("x", tuple(range(5, 34)), 90)
    state = rig.sequences.admit(1, asked)
    for layer in rig.pool.layers:
        for pages in layer:
            pages.zero_()
    tokens = [*asked.prompt, *range(40, 60)]
    before = rig.keys()
    for _ in range(2 * SCORE_EVERY):
        assert rig.drafter.propose([want(1, state, tokens, 3)], 3)[0] is not None
    changed = rig.keys() != before
    # [layers, K or V, pages, heads, offsets, dims]: where in the sequence something changed.
    places = changed.any(dim=5).any(dim=3).any(dim=1).any(dim=0).nonzero().tolist()
    owned = rig.sequences.pages_of(1)
    positions = {owned.index(page) * rig.sequences.page_size + offset for page, offset in places}
    last = len(tokens) - 1
    assert positions == {last, last + 1, last + 2}


def test_scores_are_bounded_work_and_change_the_layers(folder: Path) -> None:
    rig = Rig(folder, "exit")
    asked = Request("x", tuple(range(5, 12)), 90)
    state = rig.sequences.admit(1, asked)
    one = want(1, state, [*asked.prompt, *range(40, 60)], 2)
    scored: list[int] = []
    learn = rig.choice.learn

    def record(candidate: tuple[int, ...], agreed: int, seen: int) -> None:
        scored.append(len(candidate))
        learn(candidate, agreed, seen)

    rig.choice.learn = record  # type: ignore[method-assign]
    for _ in range(SCORE_EVERY * 8):
        rig.drafter.propose([one], 2)
    assert scored == [1, 2, 3, 4, 1, 2, 3, 4]


def test_without_depth_nothing_runs(folder: Path) -> None:
    rig = Rig(folder, "uniform:0.4")
    state = rig.sequences.admit(1, Request("x", (5, 6, 7), 90))
    before = rig.keys()
    assert rig.drafter.propose([want(1, state, (5, 6, 7), 3)], 0) == [None]
    assert torch.equal(rig.keys().nan_to_num(), before.nan_to_num())
    assert isinstance(rig.choice, Uniform)
