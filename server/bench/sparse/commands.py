"""What the calibration commands share: arguments, how a failure ends one, the rows that two of them look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.bench.client import BenchError
from server.bench.sparse import corpora
from server.bench.sparse.attended import rows_of
from server.bench.sparse.passes import Reader, windows
from server.text.tokenizer import Tokenizer


def make_parser(name: str, about: str | None, seed: int = 0) -> argparse.ArgumentParser:
    """With a model, a corpus and what every command has."""
    parser = argparse.ArgumentParser(prog=f"python -m server.bench.sparse.{name}", description=about)
    parser.add_argument("model", help="an embedded model, its folder, or a hub id")
    parser.add_argument("--corpus", default=corpora.STDLIB, help="pairs, stdlib or a text file")
    parser.add_argument("--seed", type=int, default=seed, help="of the corpus `pairs`")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Of commands that read the corpus once from its beginning."""
    parser.add_argument("--tokens", type=int, default=100_000, help="to read, at most")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once")


def add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="last rows of each text, which do the asking")


def run(
    name: str, work: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """0 = done, 2 = not (stderr says why)."""
    try:
        work(parser.parse_args(argv))
    except (BenchError, ValueError, OSError) as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return 2
    return 0


def asking_rows(args: argparse.Namespace, reader: Reader, folder: Path) -> tqdm[Any]:
    """The `Row`s of `add_rows`' arguments, with a bar."""
    texts = corpora.texts(args.corpus, Tokenizer.load(folder), args.seed, args.context, args.rows)
    rows: Any = rows_of(reader, windows(texts, args.context, args.context * args.texts), args.rows)
    return tqdm(rows, total=args.texts * args.rows, unit="row", disable=args.no_progress or None)
