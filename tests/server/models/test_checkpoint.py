"""Safetensors headers that lie, files that are cut off, folders that do not fit together: refused with a sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server import embedded as embedded_models
from server.models.checkpoint import check_against, checkpoint_hash, read_entries, read_header, read_tensor
from server.models.config import CheckpointError
from tests.tiny import write_tiny_checkpoint


def write_file(path: Path, header: Any, num_data: int = 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data))
    return path


def entry(shape: list[Any], start: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES: dict[str, tuple[Any, str]] = {
    "larger than the file": ({"a": entry([1 << 20], 0, 1 << 22)}, "should be"),
    "shape past the offsets": ({"a": entry([1 << 40, 1 << 40], 0, 64)}, "its offsets span 64"),
    "shape that wraps around 64 bits": ({"a": entry([1 << 62, 4], 0, 0)}, "its offsets span 0"),
    "negative size": ({"a": entry([-16], 0, 64)}, "not a known dtype"),
    "negative offset": ({"a": entry([16], -64, 0)}, "not a known dtype"),
    "overlap": ({"a": entry([16], 0, 64), "b": entry([8], 32, 64)}, "starts at byte"),
    "gap": ({"a": entry([4], 0, 16), "b": entry([8], 32, 64)}, "starts at byte"),
    "trailing bytes": ({"a": entry([8], 0, 32)}, "damaged"),
    "unknown dtype": ({"a": entry([16], 0, 64, "F31")}, "not a known dtype"),
    "dtype of a wrong kind": ({"a": entry([16], 0, 64, [])}, "not a known dtype"),
    "float size": ({"a": entry([16.0], 0, 64)}, "not a known dtype"),
    "entry that is no object": ({"a": 3}, "not a known dtype"),
    "header that is a list": ([1, 2], "no JSON object"),
    "no JSON": (b"{nonsense", "no readable JSON"),
    "no UTF-8": (b"\xff\xfe{}", "no readable JSON"),
    "deep nesting": (b"[" * 200_000, "no readable JSON"),
    "a name twice": (b'{"a":1,"a":1}', "twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    header, message = LIES[lie]
    with pytest.raises(CheckpointError, match=message):
        read_header(write_file(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("content", [b"", b"\x08", (1 << 63).to_bytes(8, "little"), (99).to_bytes(8, "little") + b"{}"])
def test_a_cut_off_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(path)


def test_tensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "f32": torch.randn(2, 3, 4),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = read_entries(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(entries[name]), tensor)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, path)
    entries = read_entries(tmp_path)
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(CheckpointError, match="shorter"):
        read_tensor(entries["a"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"{name}, a pickle"):
        read_entries(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_entries(tmp_path)


def test_an_index_must_fit_its_shards(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, num_shards=3, tokenizer=False)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    assert len({e.file for e in read_entries(folder).values()}) == 3

    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder / "aside")
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        read_entries(folder)
    (folder / "aside").rename(shard)

    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": shard.name}}))
    with pytest.raises(CheckpointError, match="places extra in model-00002"):
        read_entries(folder)
    index_path.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="own folder"):
        read_entries(folder)
    index_path.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_entries(folder)


def test_the_hash_is_of_the_files_that_tensors_are_loaded_from(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, num_shards=2, tokenizer=False)
    shards = sorted(folder.glob("model-*.safetensors"))
    expected = hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    assert checkpoint_hash(folder) == expected
    save_file({"a": torch.ones(2)}, folder / "filter.safetensors")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")  # the index counts where there is one
    assert checkpoint_hash(folder) == expected
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="does not hold it"):
        checkpoint_hash(folder)


def test_the_calibration_files_of_the_tree_are_of_its_weights() -> None:
    embedded = Path(embedded_models.__file__).parent
    own = checkpoint_hash(embedded / "braid-tiny-retrieval")
    files = embedded / "braid-tiny-retrieval-calibration"
    assert json.loads((files / "layers.json").read_text())["model_hash"] == own
    with safe_open(files / "channels.safetensors", framework="pt") as opened:
        assert opened.metadata()["model_hash"] == own


def test_names_shapes_and_types_are_held_against_the_architecture(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    entries = read_entries(tmp_path)
    check_against(entries, {"a": (2, 3)}, ["rotary_emb.inv_freq"])
    with pytest.raises(CheckpointError, match="lacks b"):
        check_against(entries, {"a": (2, 3), "b": (1,)}, ["rotary_emb.inv_freq"])
    with pytest.raises(CheckpointError, match=r"has rotary_emb\.inv_freq"):
        check_against(entries, {"a": (2, 3)}, [])
    with pytest.raises(CheckpointError, match=r"a is \[2, 3\] in the file, but config.json makes it \[3, 2\]"):
        check_against(entries, {"a": (3, 2)}, ["rotary_emb.inv_freq"])


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a is I8; supported: F64, F32, F16, BF16"):
        check_against(read_entries(tmp_path), {"a": (2,)}, [])
