"""The acceptance head: it learns what its labels say, and the command leaves a head that the drafter loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.embedded.train_head import main, report, train
from server.worker.drafters.acceptance_head import HEAD_FILE, AcceptanceHead, load_head
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_head_learns_what_decides_acceptance_and_says_chances() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.nn.functional.rms_norm(torch.randn(4000, 16, generator=generator), (16,))
    chance, unsure = torch.sigmoid(2 * states[:, 0]), torch.full((4000,), 0.5)
    labels = torch.stack((chance, 1 - chance), dim=1)
    head = AcceptanceHead(train(states[1000:], labels[1000:], unsure[1000:], steps=200, seed=0))
    found = head(states[:1000], unsure[:1000], [True] * 1000)
    other = head(states[:1000], unsure[:1000], [False] * 1000)
    assert (torch.tensor(found) - chance[:1000]).abs().mean() < 0.1
    assert (torch.tensor(other) - (1 - chance[:1000])).abs().mean() < 0.1


def test_a_head_without_training_is_the_confidence() -> None:
    labels = torch.zeros(600, 2)
    head = AcceptanceHead(train(torch.randn(600, 16), labels, torch.full((600,), 0.9), steps=0, seed=0))
    assert head(torch.randn(3, 16), torch.tensor([0.2, 0.5, 0.9]), [True] * 3) == pytest.approx([0.2, 0.5, 0.9])


def test_the_report_compares_head_and_confidence() -> None:
    states = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    labels, unsure = torch.ones(500, 2), torch.full((500,), 0.5)
    lines = report(train(states, labels, unsure, steps=60, seed=0), states, labels, unsure).splitlines()
    for line, temperature in zip(lines[2:], ("0", "1"), strict=True):
        name, accepted, head, confidence = (cell.strip() for cell in line.strip("|").split("|"))
        assert (name, accepted) == (temperature, "1.000")
        assert float(head) < float(confidence) == pytest.approx(0.693, abs=1e-3)


def test_the_command_writes_a_head_that_fits_the_draft(tmp_path: Path) -> None:
    target = write_tiny_checkpoint(tmp_path / "target")
    draft = write_tiny_checkpoint(tmp_path / "draft", seed=5, hidden_size=32, num_attention_heads=2)
    main(["--target", str(target), "--draft", str(draft), "--texts", "12", "--steps", "5"])
    assert (draft / HEAD_FILE).exists()
    head = load_head(draft, 32, torch.device("cpu"))
    (chance,) = head(torch.randn(1, 32), torch.full((1,), 0.5), [True])
    assert 0 < chance < 1
