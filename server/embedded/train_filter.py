"""`python -m server.embedded.train_filter`: the Learn2PD filter of an embedded model, from the model's own answers.

The filter is a two-layer perceptron, block -> block -> block with a ReLU between, that reads the confidences of all
positions of a block and says for each mask whether its likeliest token is the one that patient decoding would end
with. The teacher is the model fixing one token a step, the surest first. Then an oracle goes over the same texts and at
each step fixes exactly the masks whose likeliest token already is the teacher's, the whole block if there are none;
what the model showed before each step (confidences, and which tokens were right) is what the filter learns from.

Source: "Learning to Parallel" (Learn2PD, 2025); diffusion reference 4.7. Departures: the loss counts masks only (a
fixed token of the embedded models answers for the next token, not for itself), texts are the embedded tasks, the step
with the best validation loss is kept, and a few thousand steps are enough for a block of 8. One filter fits one model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from server.embedded import functions, tasks
from server.embedded.evaluate import (
    Choose,
    Vocabulary,
    decode_diffusion,
    denoise,
    load_folder,
    read_blocks,
    surer_than,
)
from server.embedded.model import BLOCK_SIZE, TinyModel
from server.embedded.train import HERE

FILTER_FILE = "learn2pd.safetensors"
THRESHOLD = 0.96
"""The filter's output from which a mask is fixed: Learn2PD's."""
MAX_NEW = 64
BATCH = 64
FUNCTION_SHARE = 0.15
CHECK_EVERY = 50

Filter = dict[str, Tensor]
"""w1, w2 float32 [block, block] (out, in), b1, b2 float32 [block]."""


@dataclass(frozen=True, slots=True)
class Records:
    """What the model showed before each step of the oracle. All [steps, block].

    sure     probability of the likeliest token, fixed positions included
    right    float, 1 where that token is the teacher's
    masked   where the filter has a say
    """

    sure: Tensor
    right: Tensor
    masked: Tensor

    @classmethod
    def together(cls, parts: list[Records]) -> Records:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("sure", "right", "masked")))


def filter_logits(tensors: Filter, sure: Tensor) -> Tensor:
    """Logits [N, block] that each position's token is right, from confidences [N, block]."""
    return F.linear(F.relu(F.linear(sure, tensors["w1"], tensors["b1"])), tensors["w2"], tensors["b2"])


def filter_says(tensors: Filter, threshold: float = THRESHOLD) -> Choose:
    """The masks that the filter lets pass, or the surest one."""

    def choose(sure: Tensor, masked: Tensor) -> Tensor:
        passed = (torch.sigmoid(filter_logits(tensors, sure)) > threshold) & masked
        return passed | surer_than(2.0)(sure, masked)

    return choose


def draw_prompts(tokenizer: Tokenizer, count: int, seed: int) -> list[list[int]]:
    """Token ids of prompts of the embedded tasks and functions, none twice: a text in two parts of the split would make
    the held-out figures too good."""
    rng = random.Random(f"filter:{seed}")
    known = list(functions.parse_functions().values())
    found: dict[str, list[int]] = {}
    for _ in range(100 * count):
        is_function = rng.random() < FUNCTION_SHARE
        example = functions.draw_function(known, rng) if is_function else tasks.draw_example(rng)
        found.setdefault(example.prompt, tokenizer.encode(example.prompt, add_special_tokens=False).ids)
        if len(found) == count:
            break
    return list(found.values())


def teach(model: TinyModel, prompts: list[list[int]], vocab: Vocabulary) -> list[list[int]]:
    """The teacher's rows: prompts, answers, and what fills their last blocks."""
    rows = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="teacher", unit="batch"):
        rows += denoise(model, prompts[start : start + BATCH], vocab, surer_than(2.0), MAX_NEW)[0]
    return rows


def simulate(model: TinyModel, prompts: list[list[int]], taught: list[list[int]], vocab: Vocabulary) -> Records:
    """The oracle's way through the taught rows."""
    parts = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="oracle", unit="batch"):
        parts += _simulate(model, prompts[start : start + BATCH], taught[start : start + BATCH], vocab)
    return Records.together(parts)


def _simulate(model: TinyModel, prompts: list[list[int]], taught: list[list[int]], vocab: Vocabulary) -> list[Records]:
    parts: list[Records] = []
    rows = [prompt + [vocab.mask] * (-len(prompt) % BLOCK_SIZE) for prompt in prompts]
    while True:
        for row, goal in zip(rows, taught, strict=True):
            if vocab.mask not in row and len(row) < len(goal):
                row += [vocab.mask] * BLOCK_SIZE
        active = [i for i, row in enumerate(rows) if vocab.mask in row]
        if not active:
            return parts
        sure, tokens = read_blocks(model, [rows[i] for i in active], vocab)
        masked = torch.tensor([[token == vocab.mask for token in rows[i][-BLOCK_SIZE:]] for i in active])
        goals = torch.tensor([taught[i][len(rows[i]) - BLOCK_SIZE : len(rows[i])] for i in active])
        right = tokens == goals
        parts.append(Records(sure, right.float(), masked))
        fixed = right & masked
        fixed |= masked & ~fixed.any(dim=1, keepdim=True)
        for place, i in enumerate(active):
            for offset in fixed[place].nonzero().flatten().tolist():
                rows[i][offset - BLOCK_SIZE] = int(goals[place, offset])


def loss(tensors: Filter, records: Records) -> Tensor:
    """Cross-entropy in nats a mask."""
    logits = filter_logits(tensors, records.sure)
    return F.binary_cross_entropy_with_logits(logits[records.masked], records.right[records.masked])


def train(records: Records, held: Records, steps: int, seed: int, rate: float = 3e-3) -> Filter:
    """Fit a filter on all records at once; what it is when `held` likes it best is kept."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Filter = {}
    for name in ("1", "2"):
        tensors[f"w{name}"] = (torch.rand(BLOCK_SIZE, BLOCK_SIZE, generator=generator) * 2 - 1) * BLOCK_SIZE**-0.5
        tensors[f"b{name}"] = torch.zeros(BLOCK_SIZE)
    for tensor in tensors.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(tensors.values(), lr=rate)
    best, kept = float("inf"), {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for step in tqdm(range(1, steps + 1), desc="filter", unit="step"):
        optimizer.zero_grad()
        torch.autograd.backward(loss(tensors, records))
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                now = loss(tensors, held).item()
            if now < best:
                best, kept = now, {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return kept


def report(tensors: Filter, test: Records) -> str:
    """On records that training has not seen: how good the filter's chances are, and what each rule lets pass."""
    right, sure = test.right[test.masked], test.sure[test.masked]
    chance = torch.sigmoid(filter_logits(tensors, test.sure))[test.masked]
    known = F.binary_cross_entropy(sure.clamp(1e-4, 1 - 1e-4), right)
    lines = [
        f"{len(right)} masks of {len(test.sure)} steps, {right.mean():.1%} of them right already",
        f"nats a mask: filter {loss(tensors, test):.3f}, confidence itself {known:.3f}",
        "| rule | passes | of these right | of the right passed |",
        "| --- | --- | --- | --- |",
    ]
    for name, passed in ((f"filter > {THRESHOLD}", chance > THRESHOLD), ("confidence > 0.9", sure > 0.9)):
        hits = float(right[passed].sum())
        precision, recall = hits / max(int(passed.sum()), 1), hits / max(float(right.sum()), 1.0)
        lines.append(f"| {name} | {passed.float().mean():.1%} | {precision:.1%} | {recall:.1%} |")
    return "\n".join(lines)


def decoding_report(model: TinyModel, prompts: list[list[int]], tensors: Filter, vocab: Vocabulary) -> str:
    """Prompts decoded one token a step, by threshold, and by the filter: equal answers and tokens a forward."""
    lines = ["| decoding | answers as one token a step | tokens per forward |", "| --- | --- | --- |"]
    patient: list[list[int]] = []
    modes = {
        "one token a step": surer_than(2.0),
        "threshold 0.9": surer_than(0.9),
        f"filter {THRESHOLD}": filter_says(tensors),
    }
    for name, choose in modes.items():
        answers, forwards = decode_diffusion(model, prompts, vocab, choose, MAX_NEW)
        patient = patient or answers
        same = sum(a == b for a, b in zip(answers, patient, strict=True)) / len(answers)
        lines.append(f"| {name} | {same:.1%} | {sum(len(a) + 1 for a in answers) / forwards:.2f} |")
    return "\n".join(lines)


def split(count: int) -> tuple[slice, slice, slice]:
    """80 % to learn from, 10 % to choose the step by, 10 % to report on; at least one text each."""
    tenth = max(1, count // 10)
    return slice(0, count - 2 * tenth), slice(count - 2 * tenth, count - tenth), slice(count - tenth, count)


def main(argv: list[str] | None = None) -> None:
    """Train a filter for the model in `--model` and write it into the same folder."""
    parser = argparse.ArgumentParser(prog="python -m server.embedded.train_filter", description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "braid-tiny")
    parser.add_argument("--output", type=Path, help=f"default: {FILTER_FILE} in the model's folder")
    parser.add_argument("--texts", type=_at_least(10), default=1500, help="prompts that the teacher answers")
    parser.add_argument("--steps", type=_at_least(1), default=4000, help="of the optimizer, all records each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model, vocab = load_folder(args.model), Vocabulary.of(tokenizer)
    prompts = draw_prompts(tokenizer, args.texts, args.seed)
    parts = split(len(prompts))
    # No inference mode: its tensors cannot be trained on.
    with torch.no_grad():
        taught = teach(model, prompts, vocab)
        learn, choose, test = (simulate(model, prompts[part], taught[part], vocab) for part in parts)
    tensors = train(learn, choose, args.steps, args.seed)
    with torch.no_grad():
        print(report(tensors, test))
        print(decoding_report(model, prompts[parts[2]], tensors, vocab))
    path = args.output or args.model / FILTER_FILE
    save_file(tensors, path, metadata={"format": "pt", "method": "learn2pd", "activation": "relu"})
    print(f"written: {path}")


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text}, must be at least {least}")
        return value

    return integer


if __name__ == "__main__":
    main()
