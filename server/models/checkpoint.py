"""Safetensors checkpoints, read without trusting them.

Every header is checked against its file and against the architecture before a byte of weights is read (S-62): a file
may lie about sizes, offsets and shapes, and a model must not be served from memory that is not its own. Tensors are
read into fresh memory one at a time, never mapped, so a file that changes later changes nothing here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from server.models.config import CheckpointError

MAX_HEADER_BYTES = 100 << 20
"""As in the format's own reader."""

_FORMAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ITEM_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_HASHED_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: file, byte offset in it, and the header's word on its type and shape."""

    file: Path
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder, sharded or not, from checked headers.

    Raises CheckpointError for a folder without safetensors, an index that does not fit its files, or a lying header.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_sharded(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return read_header(single)
    unsafe = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if unsafe:
        raise CheckpointError(
            f"{folder} has its weights in {unsafe[0]}, a pickle, which can run code when it is read; only safetensors "
            "are loaded. Ask its publisher for them, or convert it in a sandbox."
        )
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over the files that the model's tensors are in, in the order of their names.

    Other files of the folder do not count: a filter or a head that is put beside the weights leaves them what they are.
    Raises CheckpointError as `read_entries` does.
    """
    digest = hashlib.sha256()
    for path in sorted({entry.file for entry in read_entries(folder).values()}):
        with path.open("rb") as file:
            while chunk := file.read(_HASHED_AT_ONCE):
                digest.update(chunk)
    return digest.hexdigest()


def _read_sharded(folder: Path, index: Path) -> dict[str, Entry]:
    weight_map = _json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}; shards must lie in the checkpoint's own folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which its index names; the download may be incomplete")
        headers[file] = read_header(folder / file)
    missing = [name for name, file in weight_map.items() if name not in headers[file]]
    if missing:
        raise CheckpointError(f"{index} places {missing[0]} in {weight_map[missing[0]]}, which does not hold it")
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors file's entries; they must tile the data section exactly, without gap or overlap.

    Raises CheckpointError.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + _header_bytes(file, file_bytes, path)
        header = _json_object(file.read(start - 8), path)
    header.pop("__metadata__", None)
    entries, end = {}, start
    checked = [(name, _check_entry(name, value, start, path)) for name, value in header.items()]
    for name, entry in sorted(checked, key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path}: tensor {name} starts at byte {entry.offset}, where {end} is due")
        end += entry.num_bytes
        entries[name] = entry
    if end != file_bytes:
        raise CheckpointError(f"{path} should be {end} bytes long by its header, but is {file_bytes}; it is damaged")
    return entries


def _header_bytes(file: BinaryIO, file_bytes: int, path: Path) -> int:
    prefix = file.read(8)
    num_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or num_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(
            f"{path} ({file_bytes} bytes) states a header of {num_bytes} bytes; the file is cut off or no safetensors"
        )
    return num_bytes


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable JSON header: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has no JSON object for a header")
    return value


def _check_entry(name: str, value: Any, start: int, path: Path) -> Entry:
    fields: list[Any] = [value.get(key) if isinstance(value, dict) else None for key in _ENTRY_KEYS]
    dtype, shape, offsets = fields
    if (
        not isinstance(dtype, str)
        or dtype not in _ITEM_BYTES
        or not _is_naturals(shape)
        or not _is_naturals(offsets)
        or len(offsets) != 2
    ):
        raise CheckpointError(f"{path}: the header's entry of tensor {name} is not a known dtype, shape and offsets")
    num_bytes = _ITEM_BYTES[dtype]
    for size in shape:
        num_bytes *= size  # Python integers: a huge shape cannot wrap around
    if offsets[1] - offsets[0] != num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype} {shape} = {num_bytes} bytes, but its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(path, start + offsets[0], num_bytes, dtype, tuple(shape))


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def check_against(
    entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str]
) -> None:
    """Hold the files against the architecture: names, shapes, floating-point types.

    ignored  names (or their last part) that published files carry without use
    Raises CheckpointError listing the first few offenders.
    """
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which its config.json calls for")
    ignored = tuple(ignored)
    surplus = [name for name in entries if name not in expected and not name.endswith(ignored)]
    if surplus:
        raise CheckpointError(
            f"the checkpoint has {_some(surplus)}, for which its config.json has no place; leaving them out would "
            "give another model"
        )
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{name} is {list(entry.shape)} in the file, but config.json makes it {list(shape)}")
        if entry.dtype not in _FORMAT_DTYPES:
            raise CheckpointError(f"{name} is {entry.dtype}; supported: {', '.join(_FORMAT_DTYPES)}")


def file_names(ours: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """What the files call each tensor, by our name of it. names: as `registry.Family.names`."""
    theirs = {our: their for their, our in names.items()}

    def file_name(ours: str) -> str:
        module, _, leaf = ours.rpartition(".")
        pattern = theirs.get(_NUMBER.sub("{}", module))
        return ours if pattern is None else f"{pattern.format(*_NUMBER.findall(module))}.{leaf}"

    return {name: file_name(name) for name in ours}


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, in the file's dtype, in memory of its own on the CPU."""
    tensor = torch.empty(entry.shape, dtype=_FORMAT_DTYPES[entry.dtype])
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view = tensor.view(-1).view(torch.uint8).numpy().data
        while len(view):
            num_read = file.readinto(view)
            if not num_read:
                raise CheckpointError(f"{entry.file} became shorter while it was read")
            view = view[num_read:]
    return tensor
