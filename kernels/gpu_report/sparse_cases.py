"""What of sparse attention is timed, most wanted first, with the bytes and operations that each method must cost.

bytes  decode: what a method ranks by, read once, and the keys and values of its budget. Prefill: the keys once, to rank
       them, and of the kept tiles keys and values. Scores, lists and sorted copies are ours, not the method's: left out
FLOP   products with what is ranked and with what is kept
Random keys weigh alike, so a share of attention's mass is the same share of the tiles: a prefill's threshold stands for
how sparse a text would be. A method keeps no fewer than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from kernels.gpu_report.cases import Case, Heads, Kind, bytes_per_key, decode
from kernels.sparse import SUB_PAGE
from kernels.sparse_prefill import PermutedBlocks, XAttention
from kernels.triton.gpu_checks import Span

CHANNELS = 32
"""Of a label of Double Sparsity, as the keys are: a quarter of a head of 128, a server's default."""
FEW_KEYS = 1024
CHUNK = 2048


class Reading(StrEnum):
    """What a layer does for its decode rows. Of TidalDecode there are two kinds of layers."""

    QUEST = "quest"
    DOUBLE_SPARSITY = "double sparsity"
    DOUBLE_SPARSITY_PAGES = "double sparsity of pages"
    TIDAL_LIST = "tidal, layer that lists"
    TIDAL_FOLLOW = "tidal, layer that follows"


@dataclass(frozen=True)
class RowVariant:
    """Decode rows that read `budget` keys each."""

    reading: Reading
    budget: int

    @property
    def label(self) -> str:
        return f"{self.reading.value}, {self.budget} keys"

    def num_bytes(self, case: Case) -> int:
        """Of keys and values, and of what is beside them."""
        heads, keys = case.heads, case.spans[0].kv_len
        one = bytes_per_key(heads.head_dim, case.kv_dtype)
        ranked = {
            Reading.QUEST: 2 * (keys // SUB_PAGE) * one,
            Reading.DOUBLE_SPARSITY: keys * bytes_per_key(CHANNELS, case.kv_dtype),
            Reading.DOUBLE_SPARSITY_PAGES: keys * bytes_per_key(CHANNELS, case.kv_dtype),
            Reading.TIDAL_LIST: 2 * (keys - self.budget) * one,  # the row itself reads everything
            Reading.TIDAL_FOLLOW: 0,
        }
        return len(case.spans) * heads.num_kv * (ranked[self.reading] + 2 * self.budget * one)

    def num_flop(self, case: Case) -> int:
        heads, keys = case.heads, case.spans[0].kv_len
        ranked = {
            Reading.QUEST: 4 * heads.head_dim * (keys // SUB_PAGE),
            Reading.DOUBLE_SPARSITY: 2 * CHANNELS * keys,
            Reading.DOUBLE_SPARSITY_PAGES: 2 * CHANNELS * keys,
            Reading.TIDAL_LIST: 4 * heads.head_dim * (keys - self.budget),
            Reading.TIDAL_FOLLOW: 0,
        }
        return len(case.spans) * heads.num_q * (ranked[self.reading] + 4 * heads.head_dim * self.budget)


@dataclass(frozen=True)
class ChunkVariant:
    """A chunk of a prompt under a block-sparse method."""

    method: XAttention | PermutedBlocks

    @property
    def label(self) -> str:
        name = "x-attention" if isinstance(self.method, XAttention) else "pbs"
        return f"{name}, {self.method.threshold:.0%} of the mass"

    def num_bytes(self, case: Case) -> int:
        heads, keys = case.heads, case.spans[0].kv_len
        one = bytes_per_key(heads.head_dim, case.kv_dtype)
        return round(heads.num_kv * keys * one * (1 + 2 * self.method.threshold))

    def num_flop(self, case: Case) -> int:
        heads, span = case.heads, case.spans[0]
        if isinstance(self.method, XAttention):
            ranked = case.num_flop / (2 * self.method.stride)
        else:
            ranked = 2 * heads.head_dim * heads.num_q * min(self.method.probe, span.num_rows) * span.kv_len
        return round(ranked + self.method.threshold * case.num_flop)


@dataclass(frozen=True)
class SparseCase:
    """A dense step and what is timed beside it on the same keys, in the same rounds."""

    dense: Case
    variants: tuple[RowVariant | ChunkVariant, ...]

    @property
    def label(self) -> str:
        return f"sparse {self.dense.label}"

    @property
    def least_bytes(self) -> int:
        """That a call reads of one copy of the keys."""
        return min(variant.num_bytes(self.dense) for variant in self.variants)


def all_sparse_cases() -> list[SparseCase]:
    """What a verdict needs first, then the lengths where methods pay, then the rest of the grid."""
    return [
        _decode(8, 32768),
        _decode(8, 131072),
        _chunk(131072),
        _decode(1, 131072),
        _decode(32, 32768),
        _chunk(32768),
        _decode(1, 32768),
        _decode(32, 8192),
        _decode(8, 8192),
        _decode(1, 8192),
        _chunk(8192),
        _decode(32, 131072),
    ]


def warm_cases() -> list[SparseCase]:
    """Small steps that run all kernels of the list above: short and long rows have other ones. Not timed."""
    return [_decode(1, 4096), _decode(1, 20480), _chunk(4096)]


def tiny_sparse_cases() -> list[SparseCase]:
    """One of each kind, for interpreters."""
    heads = Heads(2, 1, 16)
    rows = Case("decode 1 x 290", Kind.DECODE, decode(1, 290), heads, torch.float32)
    chunk = Case("chunk 40 behind 260", Kind.CHUNK, (Span(300, 40),), heads, torch.float32)
    methods = (XAttention(threshold=0.5), PermutedBlocks(threshold=0.5, probe=16))
    of_pages = (Reading.QUEST, Reading.DOUBLE_SPARSITY_PAGES)
    return [
        SparseCase(rows, tuple(RowVariant(reading, 256 if reading in of_pages else 70) for reading in Reading)),
        SparseCase(chunk, tuple(ChunkVariant(method) for method in methods)),
    ]


def _decode(batch: int, keys: int) -> SparseCase:
    """All methods with a sixteenth of the keys and with `FEW_KEYS`; a list costs its layer the same with any budget."""
    share = keys // 16
    variants = [RowVariant(reading, share) for reading in Reading]
    if share != FEW_KEYS:
        variants += [RowVariant(reading, FEW_KEYS) for reading in Reading if reading is not Reading.TIDAL_LIST]
    return SparseCase(Case(f"decode {batch} x {keys}", Kind.DECODE, decode(batch, keys)), tuple(variants))


def _chunk(keys: int) -> SparseCase:
    """The last `CHUNK` rows of a prompt."""
    dense = Case(f"chunk {CHUNK} behind {keys - CHUNK}", Kind.CHUNK, (Span(keys, CHUNK),))
    methods = [make(threshold=share) for make in (XAttention, PermutedBlocks) for share in (0.1, 0.3)]
    return SparseCase(dense, tuple(ChunkVariant(method) for method in methods))
