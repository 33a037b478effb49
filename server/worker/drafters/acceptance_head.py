"""The acceptance head: from a draft model's last hidden state to the chance that the target accepts what is drawn.

A SiLU residual block and a linear layer with two outputs, the chances at temperature 0 and at temperature 1, in
float32; `python -m server.embedded.train_head` makes the file. Source: Huang et al., "SpecDec++" (2024), section 3.
Departures: the head reads the state that a token is drawn from, not the one after it, which saves the last forward of a
round and keeps the decision free of the drawn token (speculative reference, 2.5); it corrects the draft's own
confidence, which a small block cannot work out of the state (embedded models, held-out nats at temperature 0: 0.22
without it, 0.12 for confidence alone); rejections weigh 1, not 6, in training, because the planner needs chances that
are true on average; only greedy and not greedy are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

HEAD_FILE = "acceptance_head.safetensors"


def head_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a head."""
    return {
        "block.weight": (hidden_size, hidden_size),
        "block.bias": (hidden_size,),
        "out.weight": (2, hidden_size),
        "out.bias": (2,),
        "confidence.weight": (2,),
    }


def head_logits(tensors: Mapping[str, Tensor], hidden_JH: Tensor, best_J: Tensor) -> Tensor:
    """Logits [J, 2] of acceptance: greedy, sampled.

    hidden_JH  float32; it is scaled to unit mean square first. best_J: probability of the likeliest token
    """
    x_JH = F.rms_norm(hidden_JH, hidden_JH.shape[-1:])
    x_JH = x_JH + F.silu(F.linear(x_JH, tensors["block.weight"], tensors["block.bias"]))
    confidence_J1 = torch.logit(best_J, eps=1e-6).unsqueeze(1)
    return F.linear(x_JH, tensors["out.weight"], tensors["out.bias"]) + confidence_J1 * tensors["confidence.weight"]


class AcceptanceHead:
    """`stopping.AcceptanceEstimate` by a trained head."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, hidden_JH: Tensor, best_J: Tensor, is_greedy: Sequence[bool]) -> list[float]:
        chances_J2 = torch.sigmoid(head_logits(self._tensors, hidden_JH.float(), best_J)).tolist()
        return [row[0] if greedy else row[1] for row, greedy in zip(chances_J2, is_greedy, strict=True)]


def load_head(folder: Path, hidden_size: int, device: torch.device) -> AcceptanceHead:
    """The head in a draft model's folder. Raises ValueError if there is none or it does not fit the model."""
    path = folder / HEAD_FILE
    if not path.exists():
        raise ValueError(
            f"draft_stop 'acc_head' needs {HEAD_FILE} in {folder}, and there is none; "
            "make it with `python -m server.embedded.train_head`, or use 'confidence'"
        )
    shapes = head_shapes(hidden_size)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                raise ValueError(f"{path} holds {found}, but a head of this draft model is {shapes}; train it anew")
            tensors = {name: file.get_tensor(name).to(device=device, dtype=torch.float32) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(f"{path} holds numbers that are not finite; train it anew")
    return AcceptanceHead(tensors)
