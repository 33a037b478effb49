"""Scales of fp8 KV in checkpoints: their names and shapes, what they do to pages, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.kv_format import FP8
from kernels.reference import ReferenceOps
from server.models.config import CheckpointError
from server.models.kv_scales import load_scales
from server.models.loading import load_model
from server.models.registry import Model
from tests.server.models.paged import PagedRunner
from tests.tiny import write_tiny_checkpoint

CPU = torch.device("cpu")
TOKENS = list(range(3, 43))
LAYERS = 2


def load(folder: Path) -> Model:
    return load_model(folder, ReferenceOps(), torch.float32, CPU)


def logits(model: Model, kv_dtype: torch.dtype | None = FP8) -> Tensor:
    return PagedRunner(model, ReferenceOps(), 1, len(TOKENS), kv_dtype=kv_dtype).run([(0, 0, TOKENS)])[0]


def scaled(folder: Path) -> Model:
    scales = load_scales(folder)
    assert scales is not None
    return load(folder).scaled(scales)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_scales(folder: Path, name: str, value: Callable[[int, str], Tensor], layers: range = range(LAYERS)) -> None:
    """Adds a tensor for keys and one for values of each layer; {} of the name is k and v."""
    edit(
        folder,
        lambda tensors: tensors.update(
            {
                f"model.layers.{i}.{name.format(*what * name.count('{}'))}": value(i, what)
                for i in layers
                for what in "kv"
            }
        ),
    )


def large_keys(folder: Path, factor: float) -> None:
    """The same scores from keys `factor` times as large and queries as much smaller; values are `factor` times, too."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                tensors[name] *= factor
            elif name.endswith(("q_proj.weight", "o_proj.weight")):
                tensors[name] /= factor

    edit(folder, change)


@pytest.mark.parametrize(
    "name",
    ["self_attn.{}_scale", "self_attn.attn.{}_scale", "self_attn.{}_proj.output_scale", "self_attn.{}_proj.{}_scale"],
)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1)])
def test_each_published_name_and_shape_is_read(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False)
    assert load_scales(folder) is None
    numbers = torch.tensor([0.5, 4.0] if 2 in shape else [0.25])
    with_scales(folder, name, lambda i, what: ((i + 1) * (1 if what == "k" else 3) * numbers).reshape(shape))
    found = load_scales(folder)
    assert found is not None
    assert found.dtype == torch.float32
    heads = numbers.expand(2)
    assert torch.equal(found, torch.stack([torch.stack([(i + 1) * heads, (i + 1) * 3 * heads]) for i in range(LAYERS)]))
    assert torch.equal(logits(load(folder)), logits(load(write_tiny_checkpoint(tmp_path / "plain", tokenizer=False))))


def test_one_scale_of_old_files_is_for_keys_and_values(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False)
    name = "model.layers.{}.self_attn.kv_scale"
    edit(folder, lambda tensors: tensors.update({name.format(i): torch.tensor(2.0 + i) for i in range(LAYERS)}))
    found = load_scales(folder)
    assert found is not None
    assert found.tolist() == [[[2.0, 2.0]] * 2, [[3.0, 3.0]] * 2]


def test_scales_bring_large_keys_and_values_back_to_the_codes_of_small_ones_bit_for_bit(tmp_path: Path) -> None:
    small = write_tiny_checkpoint(tmp_path / "small", tokenizer=False)
    large = write_tiny_checkpoint(tmp_path / "large", tokenizer=False)
    large_keys(large, 1024.0)
    with_scales(large, "self_attn.{}_scale", lambda i, what: torch.tensor(1024.0))
    assert torch.equal(logits(scaled(large)), logits(load(small)))
    exact = logits(load(small), None)
    clipped = (logits(load(large)) - exact).abs().max()
    kept = (logits(scaled(large)) - exact).abs().max()
    assert kept < 0.1 * clipped


def test_scales_survive_a_choice_of_layers_and_an_observer(tmp_path: Path) -> None:
    """`subset` and `through` hand the blocks on; each layer keeps the scales of its own index."""
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False)
    with_scales(folder, "self_attn.{}_scale", lambda i, what: torch.tensor(64.0 if i == 0 else 0.5))
    model = scaled(folder)
    blocks = [attention for run in model._runs for attention, _ in run._layers.layers]  # type: ignore[attr-defined]
    part = model.subset([1])
    (last,) = [attention for run in part._runs for attention, _ in run._layers.layers]  # type: ignore[attr-defined]
    assert [block.kv_scale_2K[0, 0].item() for block in blocks] == [64.0, 0.5]
    assert last.kv_scale_2K is blocks[1].kv_scale_2K
    assert torch.equal(logits(model.through(ReferenceOps())), logits(model))


def test_experts_take_scales_too(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "qwen3_moe", tokenizer=False)
    with_scales(folder, "self_attn.{}_scale", lambda i, what: torch.tensor(100.0))
    coarse, plain = logits(scaled(folder)), logits(load(folder))
    assert not torch.equal(coarse, plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(()), "are positive numbers"),
        (torch.tensor(-1.0), r"k_scale is \[-1.0\]; scales of fp8 KV are positive"),
        (torch.tensor(float("nan")), "are positive numbers"),
        (torch.ones(3), r"k_scale is F32 \[3\]; .* or one for each of the 2 kv heads"),
        (torch.ones(2, 2), r"k_scale is F32 \[2, 2\]"),
        (torch.ones((), dtype=torch.int8), r"k_scale is I8 \[\]"),
    ],
)
def test_what_is_no_scale_is_refused(value: Tensor, message: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False)
    with_scales(folder, "self_attn.{}_scale", lambda i, what: value.clone())
    with pytest.raises(CheckpointError, match=message):
        load_scales(folder)


def test_scales_of_some_layers_and_second_names_are_refused(tmp_path: Path) -> None:
    some = write_tiny_checkpoint(tmp_path / "some", tokenizer=False)
    with_scales(some, "self_attn.{}_scale", lambda i, what: torch.tensor(1.0), range(1))
    for read in (load, load_scales):
        with pytest.raises(CheckpointError, match="layer 1 lacks its k_scale"):
            read(some)
    twice = write_tiny_checkpoint(tmp_path / "twice", tokenizer=False)
    for name in ("self_attn.{}_scale", "self_attn.{}_proj.output_scale"):
        with_scales(twice, name, lambda i, what: torch.tensor(1.0))
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.self_attn\.k_proj\.output_scale"):
        load(twice)
    foreign = write_tiny_checkpoint(tmp_path / "foreign", tokenizer=False)
    edit(foreign, lambda tensors: tensors.update({"model.layers.0.self_attn.q_scale": torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.self_attn\.q_scale"):
        load(foreign)


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME, **changes}


def test_a_checkpoint_whose_quantisation_is_of_its_kv_alone_is_served(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False, quantization_config=compressed())
    with_scales(folder, "self_attn.{}_scale", lambda i, what: torch.tensor(0.5))
    assert logits(scaled(folder)).isfinite().all()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            compressed(config_groups={"group_0": {"weights": {"num_bits": 4}}}),
            "quantised checkpoints are not supported",
        ),
        (compressed(kv_cache_scheme=None), "quantised checkpoints are not supported"),
        (compressed(quant_method="fp8"), "quantised checkpoints are not supported"),
        (compressed(kv_cache_scheme=SCHEME | {"type": "int"}), "kv_cache_scheme has type 'int'; supported: 'float'"),
        (compressed(kv_cache_scheme=SCHEME | {"dynamic": True}), "kv_cache_scheme has dynamic True"),
        (compressed(kv_cache_scheme=SCHEME | {"strategy": "channel"}), "kv_cache_scheme has strategy 'channel'"),
    ],
)
def test_any_other_quantisation_is_refused(quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=False, quantization_config=quantization)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
