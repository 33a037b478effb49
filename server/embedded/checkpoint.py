"""Training checkpoints: float32 weights and optimizer state in safetensors, everything else in JSON. No pickle.

A batch depends on (seed, step) alone and the model has no dropout, so no random state has to be kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.embedded.model import TinyModel

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(slots=True)
class TrainState:
    """Where a run stands. `elapsed_s` is training time, all sessions; `losses` rows: step, causal loss, loss
    of masks or of guidance."""

    preset: str
    seed: int
    step: int = 0
    elapsed_s: float = 0.0
    tokens: int = 0
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    sessions: list[dict[str, str | float | int]] = field(default_factory=list)


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"{number}.{index}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def save(folder: Path, model: TinyModel, optimizers: Sequence[torch.optim.Optimizer], state: TrainState) -> None:
    """Write a checkpoint; the state file last and every file by rename, so that a killed run leaves a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    stamp = {"step": str(state.step)}
    for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, _optimizer_tensors(optimizers))):
        save_file(tensors, folder / f"{name}.part", metadata=stamp)
        os.replace(folder / f"{name}.part", folder / name)
    (folder / f"{STATE}.part").write_text(json.dumps(asdict(state)), encoding="utf-8")
    os.replace(folder / f"{STATE}.part", folder / STATE)


def load_state(folder: Path) -> TrainState:
    """Read the JSON part. Raises FileNotFoundError if there is no checkpoint."""
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    values["losses"] = [(int(step), float(causal), float(mask)) for step, causal, mask in values["losses"]]
    return TrainState(**values)


def load_weights(folder: Path, model: TinyModel) -> None:
    """Load the float32 weights into `model`. Raises RuntimeError naming the tensors that do not fit."""
    model.load_state_dict(load_file(folder / WEIGHTS))


def load_exported(folder: Path, model: TinyModel) -> None:
    """Load the weights that `export.py` wrote. Raises RuntimeError naming the tensors that do not fit."""
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})


def load_optimizers(folder: Path, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give each optimizer the state that `save` wrote, in the same order."""
    tensors = load_file(folder / OPTIMIZER)
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
