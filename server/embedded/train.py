"""`python -m server.embedded.train`: trains an embedded model, resumable, deterministic given a seed and `--steps`.

With `--minutes` the learning rate follows the clock instead of the step count, so that a run on a busy machine still
anneals to the end of its budget; the price is that two such runs differ in their rates.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from server.embedded import checkpoint, corpus, tasks
from server.embedded.batches import Batch, BatchSource
from server.embedded.canvases import CanvasBatch, CanvasSource, canvas_loss
from server.embedded.model import PRESETS, TinyModel
from server.embedded.objective import Trunk, causal_loss, diffusion_loss
from server.embedded.retrieval import RetrievalBatch, RetrievalSource, guided_loss, retrieval_loss

HERE = Path(__file__).parent
AnyBatch = TypeVar("AnyBatch", Batch, CanvasBatch, RetrievalBatch)
Source = BatchSource | CanvasSource | RetrievalSource
RETRIEVAL = "braid-tiny-retrieval"
"""The preset whose data are pairs and questions."""
WARMUP_STEPS = 50
DECAY_SHARE = 0.5
"""Share of the run, at its end, over which the learning rate falls in a straight line to zero."""


def rate_factor(step: int, progress: float) -> float:
    """The learning rate's share of its peak: a short rise by steps, a plateau, a straight line down to 0 at progress 1.

    The plateau is what makes a run on a shared machine sound: how fast steps come may change without moving the rate.
    """
    return max(0.0, min((step + 1) / WARMUP_STEPS, 1.0, (1.0 - progress) / DECAY_SHARE))


def make_optimizers(model: TinyModel, rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (fewer steps to the same loss than AdamW), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("layers.")]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def filler_tokens(tokenizer: Tokenizer, limit: int | None) -> Tensor:
    """The standard library as one int32 row of token ids."""
    encodings = tokenizer.encode_batch(corpus.stdlib_texts(limit), add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int32)


class Trainer:
    """Owns the model, its optimizers and the run's state; `train_step` is the whole of training."""

    def __init__(self, args: argparse.Namespace, source: Source) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.source = source
        self.device = torch.device(args.device)
        self.model = TinyModel(PRESETS[args.preset])
        if args.init is not None:
            checkpoint.load_exported(args.init, self.model)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, args.rate, args.muon_rate)
        self.peaks = [args.rate if isinstance(o, torch.optim.AdamW) else args.muon_rate for o in self.optimizers]
        self.state = checkpoint.TrainState(args.preset, args.seed)
        if args.resume:
            self._resume(args.output)
        self.state.sessions.append(self._describe())
        self.trunk: Trunk = torch.compile(self.model, dynamic=False) if args.compile else self.model
        self.base_s = self.state.elapsed_s
        self.started = time.monotonic()

    def _describe(self) -> dict[str, str | float | int]:
        """What this session runs on and with, for the model card."""
        args = self.args
        return {
            "first_step": self.state.step, "device": args.device, "threads": torch.get_num_threads(), "rows": args.rows,
            "filler_rows": args.filler_rows, "row_len": args.row_len, "torch": torch.__version__,
            "init": "" if args.init is None else args.init.name, "rate": args.rate, "muon_rate": args.muon_rate,
            "task_weights": ",".join(f"{task}={weight:g}" for task, weight in args.task_weight),
            "pairs": args.pairs, "questions": args.questions, "guidance": args.guidance, "crowd": args.crowd,
            "python": platform.python_version(), "processor_cores": os.cpu_count() or 0,
        }  # fmt: skip

    def _resume(self, folder: Path) -> None:
        self.state = checkpoint.load_state(folder)
        if (self.state.preset, self.state.seed) != (self.args.preset, self.args.seed):
            raise ValueError(
                f"the checkpoint in {folder} is of preset {self.state.preset}, seed {self.state.seed}; "
                f"--preset is {self.args.preset}, --seed is {self.args.seed}"
            )
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_optimizers(folder, self.optimizers)

    def progress(self) -> float:
        """How far the run is, 0..1: by steps if `--steps` was given, else by the clock."""
        if self.args.steps is not None:
            return min(1.0, self.state.step / int(self.args.steps))
        self.state.elapsed_s = self.base_s + time.monotonic() - self.started
        return min(1.0, self.state.elapsed_s / (float(self.args.minutes) * 60))

    def _to_device(self, batch: AnyBatch) -> AnyBatch:
        moved = {name: getattr(batch, name).to(self.device, non_blocking=True) for name in batch.__slots__}
        return type(batch)(**moved)

    def _losses(self) -> tuple[Tensor | None, Tensor | None, int]:
        """The causal and the other loss of this step (of masks, or guidance), None where the run has none, and the row
        tokens they took."""
        if isinstance(self.source, RetrievalSource):
            pairs = self._to_device(self.source.batch(self.state.step))
            if self.args.guidance == 0:
                return retrieval_loss(self.model, self.trunk, pairs), None, pairs.num_tokens
            answers, guidance = guided_loss(self.model, pairs, self.args.crowd)
            return answers, self.args.guidance * guidance, pairs.num_tokens
        if isinstance(self.source, CanvasSource):
            canvases = self._to_device(self.source.batch(self.state.step))
            return None, canvas_loss(self.model, self.trunk, canvases), canvases.num_tokens
        batch = self._to_device(self.source.batch(self.state.step))
        causal = causal_loss(self.model, self.trunk, batch)
        if self.args.causal_only:
            return causal, None, batch.ids.numel()
        return causal, diffusion_loss(self.model, self.trunk, batch), batch.ids.numel() + 2 * batch.noisy_ids.numel()

    def train_step(self, progress: float) -> tuple[float, float]:
        """One update. Returns the causal and the other loss in nats a token (0 for one that is off)."""
        use_bf16 = self.args.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16):
            causal, other, num_tokens = self._losses()
        torch.autograd.backward([loss for loss in (causal, other) if loss is not None])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_factor(self.state.step, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += num_tokens
        return 0.0 if causal is None else causal.item(), 0.0 if other is None else other.item()

    def save(self) -> None:
        self.state.elapsed_s = self.base_s + time.monotonic() - self.started
        checkpoint.save(self.args.output, self.model, self.optimizers, self.state)

    def run(self) -> Iterator[tuple[float, float, float]]:
        """Train to the end of the budget, saving now and then; yields (progress, causal, other loss) a step."""
        last_save = time.monotonic()
        while (progress := self.progress()) < 1.0 and self.state.step < (self.args.stop_at or 1 << 60):
            losses = self.train_step(progress)
            if self.state.step % 10 == 0:
                self.state.losses.append((self.state.step, *losses))
            yield (progress, *losses)
            if time.monotonic() - last_save > self.args.save_minutes * 60:
                self.save()
                last_save = time.monotonic()
        self.save()


def show_progress(trainer: Trainer) -> None:
    """Run with a progress bar over the budget (per mille of steps or minutes), losses smoothed over about 50 steps."""
    smooth: tuple[float, float] | None = None
    other_name = "guidance" if trainer.args.preset == RETRIEVAL else "mask"
    with tqdm(total=1000, mininterval=5.0, bar_format="{l_bar}{bar:20}| [{elapsed}<{remaining}]{postfix}") as bar:
        for progress, causal, other in trainer.run():
            previous = smooth or (causal, other)
            smooth = (0.98 * previous[0] + 0.02 * causal, 0.98 * previous[1] + 0.02 * other)
            bar.set_postfix_str(
                f"step {trainer.state.step}, causal {smooth[0]:.3f}, {other_name} {smooth[1]:.3f}, "
                f"{trainer.state.tokens / 1e6:.2f} M tokens",
                refresh=False,
            )
            bar.update(int(1000 * progress) - bar.n)


def task_weight(text: str) -> tuple[str, float]:
    """`sort=6`. Raises ArgumentTypeError, which argparse shows."""
    task, _, weight = text.partition("=")
    if task not in tasks.WEIGHTS or not weight.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=WEIGHT with a task of {', '.join(tasks.WEIGHTS)}")
    return task, float(weight)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--causal-only` is on by default for the draft model, whose mask loss nothing uses, and
    `--bidirectional` for the model of that name."""
    parser = argparse.ArgumentParser(prog="python -m server.embedded.train", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="braid-tiny")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "braid-tiny" / "tokenizer.json")
    parser.add_argument(
        "--minutes", type=float, default=180.0, help="budget by the clock, all sessions of a run together"
    )
    parser.add_argument("--steps", type=int, default=None, help="budget in steps instead (deterministic)")
    parser.add_argument("--stop-at", type=int, default=None, help="stop and save at this step, as if interrupted")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--init", type=Path, default=None, help="begin with the weights of this exported folder")
    parser.add_argument(
        "--task-weight",
        type=task_weight,
        nargs="*",
        default=[],
        metavar="TASK=WEIGHT",
        help="in place of the usual one",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=12, help="packed rows a step")
    parser.add_argument("--filler-rows", type=int, default=2, help="how many of them are standard-library text")
    parser.add_argument("--filler-files", type=int, default=None, help="read at most this many files (tests)")
    parser.add_argument("--row-len", type=int, default=192, help="tokens a row")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak rate of AdamW (embeddings, norms)")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="peak rate of Muon (matrices)")
    parser.add_argument("--causal-only", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--bidirectional", action=argparse.BooleanOptionalAction, default=None, help="LLaDA's loss alone"
    )
    parser.add_argument("--pairs", type=int, default=16, help=f"in a row of {RETRIEVAL}")
    parser.add_argument("--questions", type=int, default=16, help="behind them")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the loss of guided heads; 0 = none")
    parser.add_argument("--crowd", type=float, default=8.0, help="how often a wrong key counts in that loss")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    args = parser.parse_args(argv)
    if args.causal_only is None:
        args.causal_only = args.preset == "braid-tiny-draft"
    if args.bidirectional is None:
        args.bidirectional = args.preset == "braid-tiny-bidirectional"
    return args


def main(argv: list[str] | None = None) -> Trainer:
    """Train as the command line says and leave a checkpoint in `--output`."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    trainer = Trainer(args, make_source(args))
    show_progress(trainer)
    return trainer


def make_source(args: argparse.Namespace) -> Source:
    """The data of a run. Raises ValueError for rows that cannot be."""
    if args.preset == RETRIEVAL:
        return RetrievalSource(args.seed, args.rows, args.pairs, args.questions)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    if args.bidirectional:
        return CanvasSource(tokenizer, args.seed, args.rows, args.row_len)
    filler = filler_tokens(tokenizer, args.filler_files)
    weights = tasks.WEIGHTS | dict(args.task_weight)
    return BatchSource(tokenizer, filler, args.seed, args.rows, args.filler_rows, args.row_len, weights)


if __name__ == "__main__":
    main()
