"""`python -m server.bench.sparse.kv_scales MODEL --output FILE`: scales for the fp8 KV cache, by layer and kv head.

A scale is the greatest magnitude of a head's keys (after norm and rotation) or values in the corpus, times the
headroom, over 448, the largest code; what passes that range is cut off. e4m3 keeps its 3 bits of mantissa over a range
of 28,672 to 1, so a headroom of 2 costs one power of two at the small end and nothing else.

Legend: T tokens, K kv heads, D head_dim, L layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.kv_format import FP8_MAX
from server.bench.sparse import corpora
from server.bench.sparse.commands import add_reading, make_parser, run
from server.bench.sparse.passes import Texts, open_model, windows
from server.models.checkpoint import checkpoint_hash
from server.models.locate import resolve_model
from server.models.registry import Model
from server.text.tokenizer import Tokenizer
from server.worker.kv_scales import write_scales


def main(argv: Sequence[str] | None = None) -> int:
    """Read the corpus and write the file. 0 = written, 2 = not (stderr says why)."""
    parser = make_parser("kv_scales", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--headroom", type=float, default=2.0, help="range of the codes over what was seen, 1 to 64")
    add_reading(parser)
    return run("kv_scales", _calibrate, parser, argv)


def _calibrate(args: argparse.Namespace) -> None:
    if not 1 <= args.headroom <= 64:
        raise ValueError(f"--headroom is {args.headroom}; it must be between 1 and 64")
    folder = resolve_model(args.model)
    model, ops = open_model(folder, args.window)
    texts = corpora.texts(args.corpus, Tokenizer.load(folder), args.seed, args.window, args.window // 2)
    with tqdm(total=args.tokens, unit="tok", disable=args.no_progress or None) as bar:
        greatest_L2K, num_tokens = measure(
            model, Texts(model.config, ops, args.window), windows(texts, args.window, args.tokens), bar
        )
    scale_L2K = scales_of(greatest_L2K, args.headroom)
    made_of = {"tokens": num_tokens, "corpus": args.corpus, "headroom": args.headroom}
    write_scales(args.output, scale_L2K, checkpoint_hash(folder), made_of)
    print(f"{args.output}: greatest magnitudes of {num_tokens} tokens, over kv heads")
    for layer, (keys, values) in enumerate(greatest_L2K.amax(2).tolist()):
        print(f"  layer {layer:<3} keys {keys:9.3f}   values {values:9.3f}")


def measure(model: Model, pages: Texts, texts: Iterable[Sequence[int]], bar: tqdm[Any]) -> tuple[Tensor, int]:
    """Greatest magnitudes, float32 [L, 2, K], keys first, and tokens read. Raises ValueError if there were none."""
    config = model.config
    greatest_L2K = torch.zeros(config.num_layers, 2, config.num_kv_heads)
    num_tokens = 0
    for tokens in texts:
        pages.read(model, tokens)
        for layer, pair in enumerate(pages.stored(len(tokens))):
            seen_2K = torch.stack([x_TKD.abs().amax((0, 2)) for x_TKD in pair])
            greatest_L2K[layer] = torch.maximum(greatest_L2K[layer], seen_2K)
        num_tokens += len(tokens)
        bar.update(len(tokens))
    if num_tokens == 0:
        raise ValueError("the corpus has fewer tokens than a window, so nothing was read")
    if not bool(greatest_L2K.isfinite().all()):
        raise ValueError("keys or values of this model are not finite")
    return greatest_L2K, num_tokens


def scales_of(greatest_L2K: Tensor, headroom: float) -> Tensor:
    """Scale 1 where a head has nothing but zeros."""
    return torch.where(greatest_L2K == 0, 1.0, greatest_L2K * (headroom / FP8_MAX))


if __name__ == "__main__":
    sys.exit(main())
