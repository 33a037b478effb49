"""`python -m server.embedded.train_head`: the acceptance head of a draft model, from the embedded models' tasks.

Both models read the same texts (prompts and right answers of the embedded tasks); at every position the label is how
the target would treat a draft drawn there: 1 or 0 at temperature 0 (do the likeliest tokens agree), and the overlap of
the two distributions at temperature 1, which is the best chance of acceptance there is. What it prints is the held-out
cross-entropy of the head beside that of the draft's own confidence, the estimate that needs no training.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kernels.ops import Ops
from kernels.select import select_ops
from server.embedded import functions, tasks
from server.models.loading import load_model
from server.models.locate import resolve_model
from server.models.registry import Model
from server.worker.drafters.acceptance_head import HEAD_FILE, head_logits, head_shapes
from server.worker.drafters.dense_reader import DenseReader

PAGE_SIZE = 32
HELD_OUT = 0.1
FUNCTION_SHARE = 0.15
MAX_TOKENS = 256
RATE, DECAY = 3e-3, 0.3


class Reader:
    """A model and pages to read texts with it."""

    def __init__(self, model: Model, ops: Ops) -> None:
        self._model = model
        self._reader = DenseReader(ops, model.config, MAX_TOKENS, PAGE_SIZE, torch.float32, torch.device("cpu"))

    def read(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states [T, H] and logits float32 [T, V] of every row."""
        hidden_TH = self._reader.read(self._model, tokens)
        return hidden_TH.float(), self._model.logits(hidden_TH)


def texts(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Token ids of prompts with their answers, and where the answer begins."""
    rng = random.Random(f"head:{seed}")
    known = list(functions.parse_functions().values())
    for _ in range(count):
        is_function = rng.random() < FUNCTION_SHARE
        example = functions.draw_function(known, rng) if is_function else tasks.draw_example(rng)
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False).ids
        answer = tokenizer.encode(example.answer, add_special_tokens=False).ids
        yield (prompt + answer)[:MAX_TOKENS], len(prompt)


def examples(target: Reader, draft: Reader, tokenizer: Tokenizer, count: int, seed: int) -> tuple[Tensor, ...]:
    """States of the draft [N, H], labels [N, 2] (greedy, sampled) and the draft's confidence [N]."""
    states, labels, confidence = [], [], []
    for tokens, start in tqdm(texts(tokenizer, count, seed), total=count, desc="texts", unit="text"):
        hidden_TH, q_TV = draft.read(tokens)
        _, p_TV = target.read(tokens)
        # The row of the prompt's last token decides the first token of the answer.
        at = slice(start - 1, len(tokens) - 1)
        size = min(p_TV.shape[1], q_TV.shape[1])
        p, q = p_TV[at, :size].softmax(dim=1), q_TV[at, :size].softmax(dim=1)
        states.append(hidden_TH[at])
        labels.append(torch.stack(((p.argmax(1) == q.argmax(1)).float(), torch.minimum(p, q).sum(1)), dim=1))
        confidence.append(q.amax(dim=1))
    return torch.cat(states), torch.cat(labels), torch.cat(confidence)


def train(states_NH: Tensor, labels_N2: Tensor, confidence_N: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """Fit a head; it starts as the confidence itself."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.zeros(shape) for name, shape in head_shapes(states_NH.shape[1]).items()}
    tensors["block.weight"] = torch.randn(tensors["block.weight"].shape, generator=generator) * 1e-2
    tensors["confidence.weight"] += 1
    for tensor in tensors.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(tensors.values(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="head", unit="step"):
        at = torch.randint(states_NH.shape[0], (512,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(head_logits(tensors, states_NH[at], confidence_N[at]), labels_N2[at])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def report(tensors: dict[str, Tensor], states_NH: Tensor, labels_N2: Tensor, confidence_N: Tensor) -> str:
    """Cross-entropy in nats of head and confidence on texts that training has not seen."""
    head_N2 = torch.sigmoid(head_logits(tensors, states_NH, confidence_N)).clamp(1e-4, 1 - 1e-4)
    lines = ["| temperature | accepted | head | confidence |", "| --- | --- | --- | --- |"]
    for column, name in enumerate(("0", "1")):
        label = labels_N2[:, column]
        known = F.binary_cross_entropy(confidence_N.clamp(1e-4, 1 - 1e-4), label)
        trained = F.binary_cross_entropy(head_N2[:, column], label)
        lines.append(f"| {name} | {label.mean():.3f} | {trained:.3f} | {known:.3f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="braid-tiny")
    parser.add_argument("--draft", default="braid-tiny-draft")
    parser.add_argument("--output", type=Path, help=f"default: {HEAD_FILE} in the draft's folder")
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    device = torch.device("cpu")
    # The products are tiny: a second thread would cost more in barriers than it computes.
    torch.set_num_threads(1)
    ops = select_ops(device, torch.float32)
    target_folder, folder = resolve_model(arguments.target), resolve_model(arguments.draft)
    readers = [Reader(load_model(path, ops, torch.float32, device), ops) for path in (target_folder, folder)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.inference_mode():
        found = examples(readers[0], readers[1], tokenizer, arguments.texts, arguments.seed)
    # Inference tensors cannot be trained on.
    states, labels, confidence = (tensor.clone() for tensor in found)
    num_held = int(HELD_OUT * len(states))
    tensors = train(states[num_held:], labels[num_held:], confidence[num_held:], arguments.steps, arguments.seed)
    print(report(tensors, states[:num_held], labels[:num_held], confidence[:num_held]))
    path = arguments.output or folder / HEAD_FILE
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
