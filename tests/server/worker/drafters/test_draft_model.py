"""The second model as a drafter: whose vocabulary it may have, what its pool costs, its acceptance head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.reference import ReferenceOps
from scheduler.types import Request, Sampling
from server.models.loading import load_model
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.drafters.acceptance_head import HEAD_FILE, head_shapes, load_head
from server.worker.drafters.config import SpeculatorConfig
from server.worker.drafters.draft_kv import DraftKV
from server.worker.drafters.draft_model import DraftModel, build_draft_model, check_vocabulary, load_draft_model
from server.worker.drafters.sequential import SequentialDrafter
from server.worker.kv_pool import KVPool, page_bytes, size_pool
from tests.server.worker.drafters.model_rig import CPU, Sequences, want
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoint

HIDDEN = 64


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("target"))


def copy_of_tokenizer(target: Path, folder: Path, **vocab: int) -> Path:
    """The target's tokenizer with other white space, and with tokens of `vocab` added."""
    folder.mkdir()
    raw = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["vocab"] |= vocab
    (folder / "tokenizer.json").write_text(json.dumps(raw, indent=3), encoding="utf-8")
    return folder


def test_a_draft_with_the_target_s_vocabulary_is_accepted_whatever_its_file_looks_like(
    target: Path, tmp_path: Path
) -> None:
    same = copy_of_tokenizer(target, tmp_path / "same")
    check_vocabulary("same", same, target, VOCAB_SIZE + 64, VOCAB_SIZE)


def test_a_draft_with_another_vocabulary_is_refused_naming_a_token(target: Path, tmp_path: Path) -> None:
    more = copy_of_tokenizer(target, tmp_path / "more", zebra=VOCAB_SIZE + 1)
    with pytest.raises(
        ValueError, match=r"draft model more has another vocabulary .* 'zebra' is id 321 there and none"
    ):
        check_vocabulary("more", more, target, VOCAB_SIZE, VOCAB_SIZE)


def test_a_draft_without_a_tokenizer_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"draft model bare has no tokenizer\.json"):
        check_vocabulary("bare", tmp_path, target, VOCAB_SIZE, VOCAB_SIZE)


def test_a_file_that_is_no_tokenizer_is_refused_by_its_path(target: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer with a vocabulary"):
        check_vocabulary("odd", tmp_path, target, VOCAB_SIZE, VOCAB_SIZE)


def test_beside_a_target_without_tokenizer_only_the_number_of_tokens_can_be_compared(target: Path) -> None:
    check_vocabulary("draft", target, None, VOCAB_SIZE, VOCAB_SIZE)
    with pytest.raises(ValueError, match="draft model draft has 320 tokens, but the model it drafts for has 999"):
        check_vocabulary("draft", target, None, VOCAB_SIZE, 999)


def test_pages_of_the_draft_are_paid_from_the_same_memory(target: Path) -> None:
    draft = load(target, target)
    own = page_bytes(draft.model.config, 16, torch.float32)
    assert draft.page_bytes(ReferenceOps(), 16, torch.float32, CPU) == own
    shape, budget = draft.model.config, 40 * own
    alone, _ = size_pool(shape, torch.float32, 16, 8, None, budget)
    both, _ = size_pool(
        shape,
        torch.float32,
        16,
        8,
        None,
        budget,
        extra_page_bytes=draft.page_bytes(ReferenceOps(), 16, torch.float32, CPU),
    )
    assert (alone, both) == (40, 20)


def load(name: Path, target: Path) -> DraftModel:
    return load_draft_model(str(name), target, VOCAB_SIZE, ReferenceOps(), torch.float32, CPU, 256, progress=False)


def build(draft: DraftModel, sequences: Sequences, stop: str = "fixed") -> SequentialDrafter:
    pool = KVPool(ReferenceOps(), draft.model.config, sequences.num_pages, sequences.page_size, torch.float32, CPU)
    return build_draft_model(draft, pool, sequences.table, ReferenceOps(), VOCAB_SIZE, 8, stop)


@pytest.mark.parametrize("num_ids", [VOCAB_SIZE - 20, VOCAB_SIZE + 64])
def test_a_padded_or_cut_table_of_embeddings_drafts_only_the_target_s_ids(
    target: Path, tmp_path: Path, num_ids: int
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "draft", vocab_size=num_ids)
    (folder / "tokenizer.json").write_bytes((target / "tokenizer.json").read_bytes())
    sequences = Sequences()
    bias = tuple((token, 40.0) for token in range(VOCAB_SIZE - 30, VOCAB_SIZE))
    asked = Request("x", tuple(range(3, 20)), 50, Sampling(temperature=1.0, seed=3, logit_bias=bias))
    state = sequences.admit(1, asked)
    offer = build(load(folder, target), sequences).propose([want(1, state, asked.prompt, 6)], 6)[0]
    assert offer is not None
    assert len(offer.tokens) == 6
    assert min(offer.tokens) >= VOCAB_SIZE - 30
    assert max(offer.tokens) < min(num_ids, VOCAB_SIZE)


def test_beyond_the_draft_s_own_positions_nothing_is_offered(target: Path, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "draft", max_position_embeddings=20)
    draft = load(folder, target)
    assert draft.max_len == 20
    sequences = Sequences()
    asked = Request("x", tuple(range(3, 24)), 50)
    state = sequences.admit(1, asked)
    assert build(draft, sequences).propose([want(1, state, asked.prompt, 4)], 4) == [None]
    assert build(draft, sequences).propose([want(1, state, asked.prompt[:10], 4)], 4) != [None]


def test_the_drafter_counts_its_weights_and_its_pages(target: Path) -> None:
    draft, sequences = load(target, target), Sequences()
    pages = sequences.num_pages * draft.page_bytes(ReferenceOps(), sequences.page_size, torch.float32, CPU)
    assert build(draft, sequences).num_bytes == draft.model.num_weight_bytes + pages


def write_head(folder: Path, out_bias: float) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in head_shapes(HIDDEN).items()}
    tensors["out.bias"] += torch.tensor([out_bias, -out_bias])
    save_file(tensors, folder / HEAD_FILE)


def test_the_acceptance_head_decides_how_far_a_chain_goes(target: Path, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "draft")
    write_head(folder, out_bias=1.0)
    sequences, draft = Sequences(), load(folder, target)
    drafter = build(draft, sequences, "acc_head")
    for seq_id, temperature, chance in ((1, 0.0, 0.7311), (2, 1.0, 0.2689)):
        asked = Request("x", tuple(range(3, 20)), 50, Sampling(temperature=temperature, seed=3))
        state = sequences.admit(seq_id, asked)
        offer = drafter.propose([want(seq_id, state, asked.prompt, 8)], 8)[0]
        assert offer is not None
        # 0.7311^4 = 0.286 is the first below the threshold; 0.2689 is at once.
        assert offer.survivals == pytest.approx([chance**i for i in range(1, (5 if temperature == 0 else 2))], abs=1e-3)


def test_a_folder_without_a_fitting_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"draft_stop 'acc_head' needs acceptance_head\.safetensors"):
        load_head(tmp_path, HIDDEN, CPU)
    write_head(tmp_path, 0.0)
    with pytest.raises(ValueError, match="train it anew"):
        load_head(tmp_path, HIDDEN + 1, CPU)
    (tmp_path / HEAD_FILE).write_bytes(b"no head")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_head(tmp_path, HIDDEN, CPU)


def test_a_draft_of_the_target_s_own_weights_offers_what_the_target_says(target: Path) -> None:
    """Through the loader and the back end's own pages, greedy: a dense run of the same model is the oracle."""
    sequences, draft = Sequences(), load(target, target)
    asked = Request("x", tuple(range(5, 30)), 50, Sampling(temperature=0.0))
    state = sequences.admit(1, asked)
    offer = build(draft, sequences).propose([want(1, state, asked.prompt, 6)], 6)[0]
    assert offer is not None
    tokens = list(asked.prompt)
    for token in offer.tokens:
        fresh = build(DraftModel(load_model(target, ReferenceOps(), torch.float32, CPU), target, 256), sequences)
        again = fresh.propose([want(1, state, tokens, 1)], 1)[0]
        assert again is not None
        assert again.tokens == (token,)
        tokens.append(token)


def test_lags_are_fed_whole_when_short_and_shortest_first_when_long() -> None:
    reach = DraftKV(catch_up_tokens=100, near=4)
    assert reach.feed_sizes([1, 4, 5, 90, 50]) == [1, 4, 5, 45, 50]
    assert reach.feed_sizes([200, 300]) == [100, 0]
    assert reach.feed_sizes([]) == []


def test_a_built_worker_pays_the_draft_s_pages_and_refuses_what_does_not_fit(target: Path, tmp_path: Path) -> None:
    def config(draft: str | None) -> WorkerConfig:
        asked = SpeculatorConfig(drafters=("draft_model",), draft_model=draft)
        return WorkerConfig(str(target), "float32", "cpu", kv_cache_bytes=1 << 20, page_size=16, speculation=asked)

    plain = build_worker(WorkerConfig(str(target), "float32", "cpu", kv_cache_bytes=1 << 20, page_size=16), False)
    worker = build_worker(config(str(target)), progress=False)
    assert worker.info.num_pages == plain.info.num_pages // 2
    assert worker.info.drafters == (("draft_model", True),)
    with pytest.raises(ValueError, match="no draft model is given"):
        build_worker(config(None), progress=False)
    other = write_tiny_checkpoint(tmp_path / "other", tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        build_worker(config(str(other)), progress=False)
