"""The Learn2PD recipe: the oracle's way is the one described, the filter learns what its labels say, and the command
leaves a file of the shape that the server reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from server.embedded.evaluate import Vocabulary
from server.embedded.export import export_model
from server.embedded.model import BLOCK_SIZE, PRESETS, TinyModel
from server.embedded.train import HERE
from server.embedded.train_filter import (
    FILTER_FILE,
    Records,
    draw_prompts,
    filter_logits,
    filter_says,
    loss,
    main,
    report,
    simulate,
    split,
    train,
)

MASK = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(HERE / "braid-tiny" / "tokenizer.json"))


class _Reveals(TinyModel):
    """Wants token `10 + position`, but at odd positions only once the place before is fixed; else token 50."""

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        before = torch.roll(ids, 1, dims=1)
        return torch.stack((before, positions), dim=-1).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        before, positions = hidden[..., 0].long(), hidden[..., 1].long()
        knows = (positions % 2 == 0) | (before != MASK)
        wanted = torch.where(knows, positions + 10, 50)
        return torch.nn.functional.one_hot(wanted, 64).float() * torch.where(knows, 30.0, 6.0)[..., None]


def test_the_oracle_fixes_what_is_right_and_records_what_was_shown(tokenizer: Tokenizer) -> None:
    prompt = [10, 11, 12, 13, 14]
    taught = [[10 + p for p in range(2 * BLOCK_SIZE)]]
    records = simulate(_Reveals(PRESETS["test"]), [prompt], taught, Vocabulary.of(tokenizer))
    masks = [row.nonzero().flatten().tolist() for row in records.masked]
    # Positions 5 and 7 of the first block are odd; 5 knows its neighbour at once, 7 after position 6.
    assert masks == [[5, 6, 7], [7], [0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7]]
    assert records.right[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert records.right[2].tolist() == [1, 0] * 4
    assert records.sure[2, 0] > 0.99 > 0.95 > records.sure[2, 1]


def test_a_step_that_would_change_nothing_fixes_the_whole_block(tokenizer: Tokenizer) -> None:
    taught = [[10, 11, 12, 13, 60, 60, 60, 60]]
    records = simulate(_Reveals(PRESETS["test"]), [[10, 11, 12, 13]], taught, Vocabulary.of(tokenizer))
    assert len(records.sure) == 1
    assert not records.right[0, 4:].any()


def made_up(count: int, seed: int) -> Records:
    """Right where the position's own confidence is above that of its left neighbour; half of all places are masks."""
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(count, BLOCK_SIZE, generator=generator)
    right = (sure > torch.roll(sure, 1, dims=1)).float()
    return Records(sure, right, torch.rand(count, BLOCK_SIZE, generator=generator) < 0.5)


def test_a_filter_learns_what_the_whole_block_says_about_a_position() -> None:
    records, held, test = made_up(3000, 0), made_up(500, 1), made_up(500, 2)
    tensors = train(records, held, steps=1500, seed=0)
    said = torch.sigmoid(filter_logits(tensors, test.sure)) > 0.5
    agreed = (said == test.right.bool())[test.masked].float().mean()
    alone = ((test.sure > 0.5) == test.right.bool())[test.masked].float().mean()
    assert agreed > 0.95 > alone
    assert loss(tensors, test) < 0.2


def test_fixed_places_carry_no_loss() -> None:
    records = made_up(50, 0)
    other = Records(records.sure, torch.where(records.masked, records.right, 1 - records.right), records.masked)
    tensors = train(records, records, steps=2, seed=0)
    assert loss(tensors, records) == loss(tensors, other)


def test_training_is_a_function_of_the_seed_and_keeps_the_best() -> None:
    records, held = made_up(200, 0), made_up(200, 1)
    first, again, other = (train(records, held, 60, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["w1"], other["w1"])
    wrong = Records(held.sure, 1 - held.right, held.masked)
    short, long = (train(records, wrong, steps, 0) for steps in (50, 800))
    assert loss(long, wrong) <= loss(short, wrong), "later steps, which `held` likes less, are not kept"


def test_the_filter_chooses_among_masks_and_always_one() -> None:
    masked = torch.tensor([[False, True, True, False, True, False, False, False]] * 2)
    sure = torch.full((2, BLOCK_SIZE), 0.3)
    sure[0, 0] = sure[1, 4] = 0.9
    nothing = {"w1": torch.zeros(8, 8), "b1": torch.zeros(8), "w2": torch.zeros(8, 8), "b2": torch.full((8,), -9.0)}
    chosen = filter_says(nothing)(sure, masked)
    assert chosen.sum(dim=1).tolist() == [1, 1]
    assert bool(chosen[1, 4])
    everything = nothing | {"b2": torch.full((8,), 9.0)}
    assert torch.equal(filter_says(everything)(sure, masked), masked)
    one = nothing | {"b2": torch.tensor([9.0, 9, -9, 9, -9, 9, 9, 9])}
    assert filter_says(one)(sure, masked)[1].nonzero().flatten().tolist() == [1, 4], "what it passes, and the surest"


def test_no_prompt_is_in_two_parts(tokenizer: Tokenizer) -> None:
    prompts = [tuple(prompt) for prompt in draw_prompts(tokenizer, 200, 0)]
    assert len(set(prompts)) == 200
    learn, choose, test = split(200)
    assert [len(prompts[part]) for part in (learn, choose, test)] == [160, 20, 20]
    assert [tuple(prompt) for prompt in draw_prompts(tokenizer, 200, 1)] != prompts


def test_the_report_counts_what_each_rule_passes() -> None:
    sure = torch.tensor([[0.95, 0.95, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1]])
    right = torch.tensor([[1.0, 0, 1, 1, 0, 0, 0, 0]])
    masked = torch.tensor([[True, True, True, True, False, False, False, False]])
    nothing = {"w1": torch.zeros(8, 8), "b1": torch.zeros(8), "w2": torch.zeros(8, 8), "b2": torch.zeros(8)}
    lines = report(nothing, Records(sure, right, masked)).splitlines()
    assert lines[0] == "4 masks of 1 steps, 75.0% of them right already"
    assert "filter 0.693" in lines[1]
    assert lines[4] == "| filter > 0.96 | 0.0% | 0.0% | 0.0% |"
    assert lines[5] == "| confidence > 0.9 | 50.0% | 50.0% | 33.3% |"


def test_the_command_writes_a_filter_of_the_block_size(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    export_model(TinyModel(PRESETS["test"]), tokenizer, tmp_path)
    arguments = ["--model", str(tmp_path), "--texts", "12", "--steps", "5"]
    main(arguments)
    found = load_file(tmp_path / FILTER_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "w1": (8, 8),
        "b1": (8,),
        "w2": (8, 8),
        "b2": (8,),
    }
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert "tokens per forward" in capsys.readouterr().out
    main([*arguments, "--output", str(tmp_path / "again.safetensors")])
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(found[name], again[name]) for name in found)
