"""`python -m server.bench.sparse.calibrate MODEL --output FILE`: the channels that label keys for Double Sparsity."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.bench.sparse import corpora
from server.bench.sparse.channels import STATISTICS, ChannelStatistics
from server.bench.sparse.commands import add_reading, make_parser, run
from server.bench.sparse.passes import Reader, windows
from server.models.checkpoint import checkpoint_hash
from server.models.locate import resolve_model
from server.text.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Read the corpus and write the file. 0 = written, 2 = not (stderr says why)."""
    parser = make_parser("calibrate", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file: `channels`, int16 [L, K, D]")
    parser.add_argument("--statistic", choices=STATISTICS, default="qk", help="whose mean ranks the channels")
    add_reading(parser)
    return run("calibrate", _calibrate, parser, argv)


def _calibrate(args: argparse.Namespace) -> None:
    folder = resolve_model(args.model)
    reader = Reader.open(folder, args.window)
    texts = corpora.texts(args.corpus, Tokenizer.load(folder), args.seed, args.window, args.window // 2)
    with tqdm(total=args.tokens, unit="tok", disable=args.no_progress or None) as bar:
        statistics = measure(reader, windows(texts, args.window, args.tokens), args.statistic, bar)
    statistics.save(args.output, checkpoint_hash(folder))
    print(
        f"{args.output}: {statistics.num_tokens} tokens, mean |{args.statistic}| of the best channels as a share of all"
    )
    means = statistics.means().sort(dim=2, descending=True).values
    for divisor in (2, 4, 8, 16):
        part = means[..., : means.shape[2] // divisor].sum(2) / means.sum(2)
        layers = " ".join(f"{share:5.0%}" for share in part.mean(1).tolist())
        print(f"  head_dim / {divisor:<2} by layer: {layers}")


def measure(reader: Reader, texts: Iterable[Sequence[int]], statistic: str, bar: tqdm[Any]) -> ChannelStatistics:
    """The statistics of all of `texts` together."""
    config = reader.config
    statistics = ChannelStatistics(statistic, config.num_layers, config.num_kv_heads, config.head_dim)
    for tokens in texts:
        reader.read(tokens, statistics.add)
        bar.update(len(tokens))
    return statistics


if __name__ == "__main__":
    sys.exit(main())
