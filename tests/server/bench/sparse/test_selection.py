"""What is kept, what attention falls on it, and which layer's list is good for which layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.sparse import FIRST_KEYS, LAST_KEYS
from server.bench.sparse import tidal
from server.bench.sparse.attended import Row, rows_of
from server.bench.sparse.passes import Reader
from server.bench.sparse.recall import recall
from server.bench.sparse.selection import exact_scores, keep, label_scores, mass, probabilities
from tests.tiny import write_tiny_checkpoint


def row(seed: int, num_layers: int = 4, num_keys: int = 200) -> Row:
    generator = torch.Generator().manual_seed(seed)
    queries = tuple(torch.randn(2, 3, 8, generator=generator) for _ in range(num_layers))
    return Row(queries, tuple(torch.randn(num_keys, 2, 8, generator=generator) for _ in range(num_layers)))


def test_the_first_and_last_keys_and_the_best_of_the_others_are_kept_equals_from_the_front() -> None:
    scores = torch.zeros(1, 100)
    scores[0, 30] = 1.0
    kept = keep(scores, FIRST_KEYS + LAST_KEYS + 3)[0].nonzero().flatten().tolist()
    assert kept == [*range(4), 4, 5, 30, *range(36, 100)]
    assert keep(scores, 100).all()
    with pytest.raises(ValueError, match="budget is 68 keys, but 68 are always kept"):
        keep(scores, 68)


def test_scores_are_the_highest_of_the_group_and_labels_of_all_channels_are_exact() -> None:
    q, k = row(0).queries[0], row(0).keys[0]
    expected = [[max(float(q[h, g] @ k[n, h]) for g in range(3)) for n in range(200)] for h in range(2)]
    assert torch.allclose(exact_scores(q, k), torch.tensor(expected), atol=1e-5)
    everything = torch.stack((torch.randperm(8), torch.randperm(8)))
    assert torch.allclose(label_scores(q, k, everything), exact_scores(q, k), atol=1e-5)
    two = torch.tensor([[5, 1], [0, 7]])
    parts = [
        [max(sum(float(q[h, g, c] * k[n, h, c]) for c in two[h]) for g in range(3)) for n in range(3)] for h in (0, 1)
    ]
    assert torch.allclose(label_scores(q, k, two)[:, :3], torch.tensor(parts), atol=1e-5)


def test_mass_is_the_share_of_the_softmax() -> None:
    q, k = row(1).queries[0], row(1).keys[0]
    kept = torch.zeros(2, 200, dtype=torch.bool)
    kept[0, 7] = kept[1, 3] = kept[1, 5] = True
    for head, keys in ((0, [7]), (1, [3, 5])):
        p = torch.stack([(k[:, head] @ q[head, g] * 0.3).softmax(0) for g in range(3)])
        assert mass(probabilities(q, k, 0.3), kept)[head].item() == pytest.approx(float(p[:, keys].sum() / 3), rel=1e-5)
    assert torch.allclose(mass(probabilities(q, k, 0.3), torch.ones_like(kept)), torch.ones(2))


def test_recall_rises_with_channels_to_one_and_finds_what_a_few_channels_carry() -> None:
    rows = [row(seed, num_layers=1, num_keys=400) for seed in range(6)]
    channels = torch.arange(8).expand(1, 2, 8)
    found = recall(rows, channels, [(1, 80), (4, 80), (8, 80)], scale=1.0)
    assert found[8, 80][0] == pytest.approx(1.0, abs=1e-6)
    assert found[1, 80][0] < found[4, 80][0] < found[8, 80][0]
    planted = [Row((r.queries[0] * torch.tensor([1.0, 1.0] + [0.0] * 6),), r.keys) for r in rows]
    assert recall(planted, channels, [(2, 80)], scale=1.0)[2, 80][0] == pytest.approx(1.0, abs=1e-6)


def test_a_layer_that_attends_as_another_is_served_by_its_list_and_chosen_accordingly() -> None:
    """Layers 3 and 4 see as one, layer 2 otherwise: re-selecting at 3 serves 4."""
    rows = []
    for seed in range(4):
        first = row(seed, num_layers=5)
        rows.append(Row((*first.queries[:4], first.queries[3]), (*first.keys[:4], first.keys[3])))
    masses, overlaps = tidal.agreement(rows, 5, 80, scale=1.0)
    assert torch.allclose(masses.diagonal(), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(overlaps.diagonal(), torch.ones(5, dtype=torch.float64))
    assert masses[3, 4] == pytest.approx(1.0)
    assert overlaps[3, 4] == pytest.approx(1.0)
    assert masses[2, 3] < 0.9
    choice = tidal.choose(masses, 2)
    assert (choice.selection_layer, choice.reselection_layer) == (2, 3)
    assert choice.mean_mass[3] == pytest.approx(1.0)
    assert choice.mean_mass[4] == pytest.approx((float(masses[2, 3]) + 1) / 2)
    assert tidal.choose(masses, 4).reselection_layer is None


def test_rows_see_all_keys_up_to_themselves(tmp_path: Path) -> None:
    reader = Reader.open(write_tiny_checkpoint(tmp_path, "qwen3"), 40)
    found = list(rows_of(reader, [list(range(5, 45)), list(range(100, 140))], tail=6, every=2))
    assert [each.num_keys for each in found] == [35, 37, 39] * 2
    assert len(found[0].queries) == 2
    assert found[0].queries[0].shape == (2, 2, 16)
    alone = next(rows_of(reader, [list(range(5, 40))], tail=1))
    assert torch.allclose(alone.queries[1], found[0].queries[1], atol=1e-5)
    assert torch.allclose(alone.keys[1], found[0].keys[1], atol=1e-5)


def test_the_command_writes_the_layers_and_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=4)
    text, file = tmp_path / "text.txt", tmp_path / "tidal.json"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    command = [str(folder), "--output", str(file), "--corpus", str(text), "--context", "160", "--texts", "1"]
    assert tidal.main([*command, "--rows", "4", "--share", "2", "--no-progress"]) == 0
    told = json.loads(file.read_text())
    assert told["selection_layer"] == 2
    assert told["reselection_layer"] == 3
    assert len(told["mass"]) == len(told["overlap"][0]) == 4
    assert "re-selection layer 3" in capsys.readouterr().out
    assert tidal.main([*command, "--selection-layer", "1"]) == 2
    assert "--selection-layer is 1, must be between 2 and the last layer, 3" in capsys.readouterr().err
