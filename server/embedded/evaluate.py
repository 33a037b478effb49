"""`python -m server.embedded.evaluate`: accuracy of a model per task, in both modes, and its loss curve.

Runs on the training-time model without a KV cache, so it is slow and independent of the server it speaks about: the
same weights are decoded (1) one token at a time, greedily, (2) denoised one token a forward, the surest first, and
(3) denoised with a threshold: every masked position surer than it is fixed in the same forward, at least one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from server.embedded import checkpoint, functions, tasks
from server.embedded.model import BLOCK_SIZE, PRESETS, TinyModel, block_causal_mask, causal_mask
from server.embedded.tokenizer import END_OF_TEXT, IM_END, MASK, PAD, token_id
from server.embedded.train import HERE

MAX_NEW = 48
"""Longest answer of a checkable task is 31 tokens; an answer that has not ended by then is wrong."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How to decode: `threshold` is None for token by token, above 1 for one position a forward."""

    name: str
    threshold: float | None


MODES = (Mode("autoregressive", None), Mode("sequential denoising", 2.0), Mode("threshold 0.9", 0.9))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The special tokens that decoding needs."""

    ends: tuple[int, ...]
    mask: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        ends = (token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, IM_END))
        return cls(ends, token_id(tokenizer, MASK), token_id(tokenizer, PAD))


def _hidden(model: TinyModel, rows: list[list[int]], pad: int, causal: bool) -> Tensor:
    """Hidden states of ragged rows, padded on the right: no row sees the padding, which comes after all it sees."""
    length = -(-max(len(row) for row in rows) // BLOCK_SIZE) * BLOCK_SIZE
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    docs = torch.tensor([[0] * len(row) + [1] * (length - len(row)) for row in rows])
    positions = torch.arange(length).expand(len(rows), -1)
    mask = causal_mask(docs, positions) if causal else block_causal_mask(docs, positions)
    hidden: Tensor = model(ids, positions, mask)
    return hidden


def decode_autoregressive(
    model: TinyModel, prompts: list[list[int]], vocab: Vocabulary, max_new: int = MAX_NEW
) -> tuple[list[list[int]], int]:
    """Greedy continuation of each prompt without its end token, and the sum over prompts of the forwards they took."""
    rows, forwards = [list(prompt) for prompt in prompts], 0
    running = set(range(len(rows)))
    while running:
        active = sorted(running)
        hidden = _hidden(model, [rows[i] for i in active], vocab.pad, causal=True)
        last = torch.tensor([len(rows[i]) - 1 for i in active])
        logits = model.logits(hidden[torch.arange(len(active)), last])
        logits[:, [vocab.mask, vocab.pad]] = -torch.inf
        forwards += len(active)
        for index, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            rows[index].append(token)
            if token in vocab.ends or len(rows[index]) - len(prompts[index]) >= max_new:
                running.discard(index)
    return [_until_end(row[len(prompt) :], vocab) for row, prompt in zip(rows, prompts, strict=True)], forwards


Choose = Callable[[Tensor, Tensor], Tensor]
"""Confidences and masks of blocks, float and bool [A, block] -> which masks to fix, bool [A, block], one at least."""


def surer_than(threshold: float) -> Choose:
    """The masks surer than `threshold`, or the surest one."""

    def choose(sure: Tensor, masked: Tensor) -> Tensor:
        best = sure.masked_fill(~masked, -1.0).argmax(dim=1)
        return ((sure > threshold) & masked) | F.one_hot(best, masked.shape[1]).bool()

    return choose


def decode_diffusion(
    model: TinyModel, prompts: list[list[int]], vocab: Vocabulary, choose: Choose, max_new: int = MAX_NEW
) -> tuple[list[list[int]], int]:
    """Denoise block by block (blocks aligned to the sequence's start); returns as `decode_autoregressive`."""
    rows, forwards = denoise(model, prompts, vocab, choose, max_new)
    return [_until_end(row[len(prompt) :], vocab) for row, prompt in zip(rows, prompts, strict=True)], forwards


def denoise(
    model: TinyModel, prompts: list[list[int]], vocab: Vocabulary, choose: Choose, max_new: int
) -> tuple[list[list[int]], int]:
    """Whole rows, prompts and what fills the last block included, and the sum over prompts of the forwards."""
    rows = [prompt + [vocab.mask] * (-len(prompt) % BLOCK_SIZE) for prompt in prompts]
    forwards, running = 0, set(range(len(rows)))
    while running:
        for index in sorted(running):
            if vocab.mask not in rows[index]:
                answer = rows[index][len(prompts[index]) :]
                if any(end in answer for end in vocab.ends) or len(answer) >= max_new:
                    running.discard(index)
                else:
                    rows[index] += [vocab.mask] * BLOCK_SIZE
        if not running:
            break
        active = sorted(running)
        sure, tokens = read_blocks(model, [rows[i] for i in active], vocab)
        forwards += len(active)
        masked = torch.tensor([[token == vocab.mask for token in rows[i][-BLOCK_SIZE:]] for i in active])
        chosen = choose(sure, masked)
        for place, index in enumerate(active):
            for offset in chosen[place].nonzero().flatten().tolist():
                rows[index][offset - BLOCK_SIZE] = int(tokens[place, offset])
    return rows, forwards


def read_blocks(model: TinyModel, rows: list[list[int]], vocab: Vocabulary) -> tuple[Tensor, Tensor]:
    """The likeliest token at every place of each row's last block, and its probability: float and int64 [A, block]."""
    hidden = _hidden(model, rows, vocab.pad, causal=False)
    at = torch.tensor([len(row) - BLOCK_SIZE for row in rows])[:, None] + torch.arange(BLOCK_SIZE)
    logits = model.logits(hidden[torch.arange(len(rows))[:, None], at]).float()
    logits[:, :, [vocab.mask, vocab.pad]] = -torch.inf
    sure, tokens = logits.softmax(-1).max(-1)
    return sure, tokens


def _until_end(ids: list[int], vocab: Vocabulary) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in vocab.ends), len(ids))
    return ids[:stop]


def load_folder(folder: Path) -> TinyModel:
    """The exported model of `folder` (its preset is the one whose sizes its config.json has), in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = (config["hidden_size"], config["num_hidden_layers"])
    shape = next((s for s in PRESETS.values() if (s.hidden, s.num_layers) == sizes), None)
    if shape is None:
        raise ValueError(f"{folder}/config.json: hidden size and layers {sizes} are those of no preset in model.py")
    model = TinyModel(shape)
    checkpoint.load_exported(folder, model)
    return model.eval()


def _check(example: tasks.Example, text: str) -> bool:
    return text == example.answer.removesuffix(IM_END) if example.task == "function" else tasks.check(example, text)


def function_examples() -> list[tasks.Example]:
    """Each function as it stands, without docstring, from its `def` line."""
    examples = []
    for text in functions.parse_functions().values():
        head, body = functions.drop_docstring(text).split("\n", 1)
        examples.append(tasks.Example("function", head, f"\n{body}"))
    return examples


def evaluate(
    model: TinyModel, tokenizer: Tokenizer, samples: int, seed: int, modes: tuple[Mode, ...] = MODES
) -> dict[str, dict[str, dict[str, float]]]:
    """`{mode: {task: {accuracy, samples, tokens_per_forward}}}`, `samples` fresh examples a task, all functions."""
    vocab = Vocabulary.of(tokenizer)
    sets = {task: [tasks.make_example(task, random.Random(f"eval:{seed}:{task}:{i}")) for i in range(samples)]
            for task in tasks.MAKERS}  # fmt: skip
    sets["function"] = function_examples()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode in modes:
        results[mode.name] = {}
        for task, examples in tqdm(sets.items(), desc=mode.name):
            prompts = [tokenizer.encode(example.prompt, add_special_tokens=False).ids for example in examples]
            max_new = 160 if task == "function" else MAX_NEW
            with torch.inference_mode():
                if mode.threshold is None:
                    answers, forwards = decode_autoregressive(model, prompts, vocab, max_new)
                else:
                    answers, forwards = decode_diffusion(model, prompts, vocab, surer_than(mode.threshold), max_new)
            texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in answers]
            right = sum(_check(example, text) for example, text in zip(examples, texts, strict=True))
            results[mode.name][task] = {
                "accuracy": round(right / len(examples), 4),
                "samples": len(examples),
                "tokens_per_forward": round(sum(len(ids) + 1 for ids in answers) / forwards, 3),
            }
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as a Markdown table: tasks down, modes across, tokens per forward in the last row."""
    lines = ["| task | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for task in next(iter(results.values())):
        cells = [f"{result[task]['accuracy']:.0%}" for result in results.values()]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    means = [sum(row["tokens_per_forward"] for row in result.values()) / len(result) for result in results.values()]
    return "\n".join([*lines, "| *tokens per forward (mean)* | " + " | ".join(f"{mean:.2f}" for mean in means) + " |"])


def plot_losses(folder: Path) -> None:
    """Write `loss.png` from `training.json`. Needs matplotlib."""
    from matplotlib.figure import Figure

    losses = json.loads((folder / "training.json").read_text(encoding="utf-8"))["losses"]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for column, label in ((1, "next token"), (2, "masked token")):
        values = [row[column] for row in losses]
        if any(values):
            smooth = [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(values))]
            axes.plot([row[0] for row in losses], smooth, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token (mean of 10 readings)", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=80)


def main(argv: list[str] | None = None) -> None:
    """Evaluate a folder written by `server.embedded.export`; writes `evaluation.json` and `loss.png` into it."""
    parser = argparse.ArgumentParser(prog="python -m server.embedded.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "braid-tiny")
    parser.add_argument("--samples", type=int, default=100, help="examples a task")
    parser.add_argument("--seed", type=int, default=1, help="of the examples; training draws from another stream")
    parser.add_argument("--autoregressive-only", action="store_true", help="for a model trained without the mask loss")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    modes = MODES[:1] if args.autoregressive_only else MODES
    results = evaluate(load_folder(args.model), tokenizer, args.samples, args.seed, modes)
    (args.model / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_losses(args.model)
    print(table(results))


if __name__ == "__main__":
    main()
