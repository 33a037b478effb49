"""What is timed: the cases of `attention.md` 6.3, most wanted first, with the bytes and operations each must cost.

bytes  every key and value that some row sees, read once (queries and results are left out: under 1 % of all but tiny)
FLOP   4 x head size x query heads for each (row, key it sees): two products, a multiplication and an addition each
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from kernels.triton.gpu_checks import Span


class Kind(StrEnum):
    DECODE = "decode"
    SKEW = "skew"
    VERIFY = "verify"
    TREE = "tree"
    DENOISE = "denoise"
    PREFILL = "prefill"
    CHUNK = "chunk"
    MIXED = "mixed"
    SHARED = "shared prefix"


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads, head size."""

    num_q: int = 32
    num_kv: int = 8
    head_dim: int = 128

    @property
    def group(self) -> int:
        return self.num_q // self.num_kv

    def __str__(self) -> str:
        return f"G{self.group} D{self.head_dim}"


@dataclass(frozen=True)
class Case:
    """One step of attention.

    parts        steps that the same rounds time beside it: its ratio is to the sum of theirs
    shared_keys  first keys that all sequences have in common, in the same pages
    with_flex    time flex_attention beside it: seconds of compilation for every case, so only where it tells most
    """

    name: str
    kind: Kind
    spans: tuple[Span, ...]
    heads: Heads = Heads()
    kv_dtype: torch.dtype = torch.bfloat16
    parts: tuple[tuple[Span, ...], ...] = ()
    shared_keys: int = 0
    with_flex: bool = False

    @property
    def label(self) -> str:
        dtype = "" if self.kv_dtype == torch.bfloat16 else f" {str(self.kv_dtype).removeprefix('torch.')}"
        heads = "" if self.heads == Heads() else f" {self.heads}"
        return f"{self.name}{heads}{dtype}"

    @property
    def num_bytes(self) -> int:
        keys = sum(span.kv_len for span in self.spans) - self.shared_keys * (len(self.spans) - 1)
        return 2 * self.heads.num_kv * keys * bytes_per_key(self.heads.head_dim, self.kv_dtype)

    @property
    def num_flop(self) -> int:
        return 4 * self.heads.head_dim * self.heads.num_q * sum(num_seen(span) for span in self.spans)

    def floor_s(self, copy_bytes_per_s: float, matrix_flop_per_s: float) -> float:
        """No kernel can be faster: its bytes at the copy rate, its operations at the rate of a large product."""
        return max(self.num_bytes / copy_bytes_per_s, self.num_flop / matrix_flop_per_s)


def bytes_per_key(head_dim: int, dtype: torch.dtype) -> int:
    """Of one key (or value) of one head; int8 keeps a 32-bit scale beside each."""
    return head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)


def num_seen(span: Span) -> int:
    """(Row, key) pairs of a span without a window."""
    if not span.parents:
        return sum(span.visible())
    start = span.kv_len - span.num_rows
    return sum(start + len(span.path(row)) for row in range(span.num_rows))


def decode(batch: int, keys: int) -> tuple[Span, ...]:
    return (Span(keys, 1),) * batch


def binary_tree(num_nodes: int) -> tuple[int, ...]:
    return tuple((node - 1) // 2 if node else -1 for node in range(num_nodes))


SKEWED = (Span(131072, 1), *decode(31, 4096))
FP8 = torch.float8_e4m3fn


def all_cases(kv_dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """The whole list. kv_dtypes: those that the back end's pages can have besides the activations' own."""
    found = _main_cases()
    for dtype in kv_dtypes:
        grid = ((32, 8192), (32, 32768), (1, 131072), (32, 2048), (128, 2048), (8, 8192), (64, 4096))
        found += [_decode(batch, keys, kv_dtype=dtype) for batch, keys in grid]
    found += _other_heads()
    return found


def _decode(batch: int, keys: int, **fields: object) -> Case:
    return replace(Case(f"decode {batch} x {keys}", Kind.DECODE, decode(batch, keys)), **fields)  # type: ignore[arg-type]


def _main_cases() -> list[Case]:
    """32 query heads over 8, head size 128, bfloat16. What the verdicts need stands before what completes the grid."""
    judged = [(32, 2048), (32, 8192), (128, 2048), (64, 8192), (32, 32768), (1, 32768), (1, 131072)]
    rest = [(batch, keys) for keys in (512, 2048, 8192, 32768, 131072) for batch in (1, 8, 32, 64, 128)]
    found = [_decode(*at, with_flex=at in ((32, 2048), (1, 32768))) for at in judged]
    found.append(Case("decode 1 x 131072 + 31 x 4096", Kind.SKEW, SKEWED))
    one_row = decode(32, 8192)
    for rows in (2, 4, 8):
        found.append(Case(f"verify 32 x {rows} rows x 8192", Kind.VERIFY, (Span(8192, rows),) * 32, parts=(one_row,)))
    found.append(_denoise(8192))
    for keys in (8192, 32768, 2048, 16384, 4096, 1024, 512):
        found.append(Case(f"prefill {keys}", Kind.PREFILL, (Span(keys, keys),), with_flex=keys == 8192))
    chunk, decodes = (Span(2048, 2048),), decode(64, 4096)
    mixed = Case("64 decodes x 4096 + chunk 2048", Kind.MIXED, (*decodes, *chunk), parts=(decodes, chunk))
    found.append(mixed)
    for prefix in (8192, 32768):
        found.append(Case(f"chunk 2048 behind {prefix}", Kind.CHUNK, (Span(prefix + 2048, 2048),)))
    found.append(Case("64 x (8192 shared + 256)", Kind.SHARED, decode(64, 8448), shared_keys=8192))
    for nodes in (32, 64):
        tree = Span(8192, nodes, parents=binary_tree(nodes))
        found.append(Case(f"tree 32 x {nodes} nodes x 8192", Kind.TREE, (tree,) * 32, parts=(one_row,)))
    found.append(_denoise(1024))
    lengths = torch.randint(128, 8193, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    found.append(Case("decode 32 x U(128, 8192)", Kind.SKEW, tuple(Span(length, 1) for length in lengths)))
    return found + [_decode(*at) for at in rest if at not in judged]


def _denoise(keys: int) -> Case:
    blocks, one_row = (Span(keys, 32, 32),) * 32, decode(32, keys)
    return Case(f"denoise 32 x 32 rows x {keys}", Kind.DENOISE, blocks, parts=(one_row,))


def _other_heads() -> list[Case]:
    """Groups of 1 and 8, head size 64: a corner of the grid each, then a prefill."""
    found = []
    for heads in (Heads(32, 4, 128), Heads(32, 8, 64), Heads(16, 16, 128), Heads(32, 4, 64), Heads(16, 16, 64)):
        found += [_decode(batch, keys, heads=heads) for batch, keys in ((32, 2048), (32, 8192), (1, 32768), (128, 512))]
        found.append(Case("prefill 8192", Kind.PREFILL, (Span(8192, 8192),), heads))
    return found


def tiny_cases() -> list[Case]:
    """One of each kind, for interpreters: seconds, and no figure of it means anything."""
    heads, decodes, chunk = Heads(2, 1, 16), decode(2, 40), (Span(48, 20),)
    tree = Span(40, 5, parents=binary_tree(5))
    return [
        Case("decode 2 x 40", Kind.DECODE, decodes, heads, torch.float32, with_flex=True),
        Case("decode 70 + 2 x 17", Kind.SKEW, (Span(70, 1), *decode(2, 17)), heads, torch.float32),
        Case("verify 2 x 3 rows x 40", Kind.VERIFY, (Span(40, 3),) * 2, heads, torch.float32, parts=(decodes,)),
        Case("tree 1 x 5 nodes x 40", Kind.TREE, (tree,), heads, torch.float32, parts=(decode(1, 40),)),
        Case("denoise 1 x 8 rows x 40", Kind.DENOISE, (Span(40, 8, 8),), heads, torch.float32, parts=(decode(1, 40),)),
        Case("prefill 33", Kind.PREFILL, (Span(33, 33),), heads, torch.float32, with_flex=True),
        Case("chunk 20 behind 28", Kind.CHUNK, chunk, heads, torch.float32),
        Case("2 decodes + chunk", Kind.MIXED, (*decodes, *chunk), heads, torch.float32, parts=(decodes, chunk)),
        Case("2 x (32 shared + 8)", Kind.SHARED, decodes, heads, torch.float32, shared_keys=32),
    ]
