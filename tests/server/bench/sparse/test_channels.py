"""Channel statistics: added up over windows, and those of a direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from server.bench.client import BenchError
from server.bench.sparse import calibrate
from server.bench.sparse.channels import STATISTICS, ChannelStatistics
from server.bench.sparse.passes import Reader, windows
from server.models.checkpoint import checkpoint_hash
from server.worker.attention_calibration import Calibration, load_channels
from tests.tiny import write_tiny_checkpoint


def drawn(seed: int, tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 4, 8, generator=generator), torch.randn(tokens, 2, 8, generator=generator)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_mistake_10_windows_add_up_and_none_overwrites_those_before(statistic: str) -> None:
    """The published calibration of the qk statistic keeps its last window alone."""
    parts, whole = (ChannelStatistics(statistic, 1, 2, 8) for _ in range(2))
    (q1, k1), (q2, k2) = drawn(1), drawn(2, 3)
    parts.add(0, q1, k1)
    parts.add(0, q2, k2)
    whole.add(0, torch.cat((q1, q2)), torch.cat((k1, k2)))
    assert parts.num_tokens == whole.num_tokens == 8
    assert torch.allclose(parts.means(), whole.means(), rtol=1e-12)
    last = ChannelStatistics(statistic, 1, 2, 8)
    last.add(0, q2, k2)
    assert not torch.allclose(parts.means(), last.means(), rtol=0.01)


def test_a_group_is_one_list_and_equals_come_in_order() -> None:
    statistics = ChannelStatistics("qk", 1, 1, 4)
    q, k = torch.tensor([[[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, -4.0]]]), torch.tensor([[[1.0, 9.0, -1.0, 0.5]]])
    statistics.add(0, q, k)
    assert statistics.means()[0, 0].tolist() == pytest.approx([2.0, 0.0, 2.0, 2.0])
    assert statistics.channels()[0, 0].tolist() == [0, 2, 3, 1]


def test_no_tokens_give_no_channels() -> None:
    with pytest.raises(ValueError, match="no tokens were read"):
        ChannelStatistics("qk", 1, 1, 4).channels()
    with pytest.raises(ValueError, match="statistic is 'v', must be one of qk, k, q"):
        ChannelStatistics("v", 1, 1, 4)


def direct(folder: Path, texts: list[list[int]], statistic: str) -> Tensor:
    """Means from the publisher's hidden states and complex rotations, [L, K, D]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: list[Tensor] = [torch.zeros(2, 16, dtype=torch.float64) for _ in model.model.layers]
    for text in texts:
        with torch.inference_mode():
            states = model.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        angles = torch.arange(len(text))[:, None] * 10000.0 ** (-torch.arange(8) / 8)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        for layer, x in zip(model.model.layers, states, strict=False):
            attention, x = layer.self_attn, layer.input_layernorm(x[0])
            rotated = []
            for project, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
                heads = norm(project(x).view(len(text), -1, 16)).detach()
                pairs = torch.complex(heads[..., :8], heads[..., 8:]) * turn
                rotated.append(torch.cat((pairs.real, pairs.imag), dim=-1).double())
            q, k = rotated
            total = sums[attention.layer_idx]
            for head in range(4):
                product = {"qk": q[:, head] * k[:, head // 2], "k": k[:, head // 2] / 2, "q": q[:, head]}[statistic]
                total[head // 2] += product.abs().sum(0)
    return torch.stack(sums) / sum(len(text) for text in texts)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_calibration_of_random_weights_is_that_of_a_direct_computation(tmp_path: Path, statistic: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, "qwen3")
    texts = [list(range(5, 45)), list(range(200, 240))]
    statistics = calibrate.measure(Reader.open(folder, 40), texts, statistic, tqdm(disable=True))
    assert torch.allclose(statistics.means(), direct(folder, texts, statistic), rtol=1e-4)


def test_the_command_writes_sorted_channels_with_what_they_were_made_of(tmp_path: Path) -> None:
    folder, text, file = (
        write_tiny_checkpoint(tmp_path / "model", "qwen3"),
        tmp_path / "text.txt",
        tmp_path / "c.safetensors",
    )
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    command = [str(folder), "--output", str(file), "--corpus", str(text), "--window", "64", "--tokens", "128"]
    assert calibrate.main([*command, "--no-progress"]) == 0
    with safe_open(file, framework="pt") as opened:
        channels, metadata = opened.get_tensor("channels"), opened.metadata()
    assert channels.dtype == torch.int16
    assert channels.sort(dim=2).values.tolist() == [[list(range(16))] * 2] * 2
    assert metadata == {"model_hash": checkpoint_hash(folder), "statistic": "qk", "tokens": "128"}
    served = load_channels(Calibration((str(file),), checkpoint_hash(folder)), Reader.open(folder, 64).config, 4)
    assert served.tolist() == channels[:, :, :4].tolist()


def test_a_corpus_that_is_not_there_is_an_error_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", "qwen3")
    assert calibrate.main([str(folder), "--output", str(tmp_path / "c"), "--corpus", "nowhere.txt"]) == 2
    assert "corpus 'nowhere.txt' is neither pairs nor stdlib nor a text file" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_windows_join_texts_and_leave_the_rest_out() -> None:
    assert list(windows([[1, 2, 3], [4, 5], [6, 7, 8]], 3, 100)) == [[1, 2, 3], [4, 5, 6]]
    assert list(windows([[1] * 100], 10, 25)) == [[1] * 10] * 3


def test_a_model_with_windows_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "mistral", sliding_window=8)
    with pytest.raises(BenchError, match="without windows"):
        Reader.open(folder, 32)
