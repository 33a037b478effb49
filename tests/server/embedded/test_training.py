"""Batches and training: block alignment, noise only on answers, and resuming as if never interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from server.embedded import corpus, train
from server.embedded.batches import IGNORED, BatchSource, encode_example
from server.embedded.evaluate import Vocabulary, decode_autoregressive, decode_diffusion, surer_than
from server.embedded.model import BLOCK_SIZE, PRESETS, TinyModel
from server.embedded.tasks import Example
from server.embedded.train import HERE, rate_factor

SMALL = ["--preset", "test", "--rows", "4", "--filler-rows", "1", "--row-len", "64", "--filler-files", "3",
         "--dtype", "float32", "--threads", "1", "--steps", "6"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(HERE / "braid-tiny" / "tokenizer.json"))


def _source(tokenizer: Tokenizer, seed: int = 0) -> BatchSource:
    return BatchSource(tokenizer, torch.arange(4000, dtype=torch.int32), seed, 6, 1, 128)


def test_documents_start_on_blocks_and_their_last_block_is_filled_with_end_of_text(tokenizer: Tokenizer) -> None:
    document = encode_example(tokenizer, Example("sort", "sort: 7 3 9 ->", " 3 7 9\n"))
    assert len(document.ids) % BLOCK_SIZE == 0
    assert set(document.ids[document.stop - 1 :]) == {0}
    assert tokenizer.decode(document.ids[document.start : document.stop - 1]) == " 3 7 9\n"


def test_noise_falls_on_answers_only_and_the_causal_loss_predicts_the_next_token(tokenizer: Tokenizer) -> None:
    source = _source(tokenizer)
    for step in range(5):
        batch = source.batch(step)
        clean = batch.ids[: batch.num_task_rows]
        noisy = batch.noisy_ids
        assert set(noisy[noisy != clean].tolist()) == {source.mask_id}
        learned = batch.next_ids[:, :-1] != IGNORED
        assert torch.equal(batch.next_ids[:, :-1][learned], batch.ids[:, 1:][learned])
        starts = (batch.positions == 0) & (batch.docs >= 0)
        assert (starts.nonzero()[:, 1] % BLOCK_SIZE == 0).all()
        assert not (noisy == source.mask_id)[:, 0].any()  # a row starts with a prompt, which is never hidden


def test_a_batch_depends_on_seed_and_step_alone(tokenizer: Tokenizer) -> None:
    first, again = _source(tokenizer), _source(tokenizer)
    first.batch(0)
    assert torch.equal(first.batch(7).noisy_ids, again.batch(7).noisy_ids)
    assert not torch.equal(first.batch(8).ids, again.batch(7).ids)
    assert not torch.equal(_source(tokenizer, seed=1).batch(7).ids, again.batch(7).ids)


def test_a_row_length_off_the_block_grid_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="multiple of the block size 8"):
        BatchSource(tokenizer, torch.arange(100, dtype=torch.int32), 0, 2, 1, 60)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that was stopped after three."""
    folder = tmp_path_factory.mktemp("interrupted")
    train.main([*SMALL, "--output", str(folder), "--stop-at", "3"])
    return folder


def test_an_interrupted_run_ends_with_the_same_weights(interrupted: Path, tmp_path: Path) -> None:
    whole = train.main([*SMALL, "--output", str(tmp_path / "whole")])
    shutil.copytree(interrupted, tmp_path / "cut")
    resumed = train.main([*SMALL, "--output", str(tmp_path / "cut"), "--resume"])
    assert resumed.state.step == whole.state.step == 6
    assert resumed.state.tokens == whole.state.tokens
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert not any(path.suffix in (".pt", ".pkl", ".part") for path in (tmp_path / "cut").iterdir())


def test_resuming_with_another_seed_is_refused(interrupted: Path) -> None:
    with pytest.raises(ValueError, match="--seed is 9"):
        train.main([*SMALL, "--output", str(interrupted), "--resume", "--seed", "9"])


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    trainer = train.main([*SMALL[:-1], "20", "--output", str(tmp_path)])
    (_, causal, mask), (_, last_causal, last_mask) = trainer.state.losses[0], trainer.state.losses[-1]
    assert last_causal < causal
    assert last_mask < mask


def test_the_rate_rises_by_steps_and_falls_to_zero_by_progress() -> None:
    assert rate_factor(0, 0.0) == pytest.approx(0.02)
    assert rate_factor(100, 0.4) == 1.0
    assert rate_factor(100, 0.75) == pytest.approx(0.5)
    assert rate_factor(100, 1.0) == 0.0


def test_the_filler_leaves_out_the_tests_of_the_standard_library() -> None:
    texts = corpus.stdlib_texts(40)
    assert len(texts) == 40
    assert sum(map(len, texts)) > 100_000


class _Scripted(TinyModel):
    """Wants token `10 + position` at every position; mask rows of even positions are surer than those of odd ones."""

    forwards = 0

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return torch.stack((ids, positions), dim=-1).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        ids, positions = hidden[..., 0].long(), hidden[..., 1].long()
        own = torch.where(ids == 3, positions, positions + 1)
        wanted = torch.where(own >= 13, 0, own + 10)
        height = torch.where((ids != 3) | (positions % 2 == 0), 30.0, 4.0)
        return torch.nn.functional.one_hot(wanted, 64).float() * height[..., None]


@pytest.mark.parametrize(("threshold", "forwards"), [(None, 9), (2.0, 11), (0.9, 8)])
def test_every_mode_decodes_the_text_the_model_wants(
    tokenizer: Tokenizer, threshold: float | None, forwards: int
) -> None:
    model, vocab = _Scripted(PRESETS["test"]), Vocabulary.of(tokenizer)
    prompt = [10, 11, 12, 13, 14]
    if threshold is None:
        answers, count = decode_autoregressive(model, [prompt], vocab)
    else:
        answers, count = decode_diffusion(model, [prompt], vocab, surer_than(threshold))
    assert answers == [[15, 16, 17, 18, 19, 20, 21, 22]]
    assert count == model.forwards == forwards
