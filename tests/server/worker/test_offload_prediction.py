"""How well a layer's query is predicted, on the embedded model: why it is predicted from the stream before the last
MLP, and not, as in the paper, from the stream before the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.blocks import AttentionBlock, DenseLayers
from kernels.hosted import Pages
from kernels.ops import AttentionRows
from kernels.reference import ReferenceOps, rotate
from kernels.sparse import FIRST_KEYS, LAST_KEYS
from server.models.loading import load_model
from server.models.locate import resolve_model

OPS, CPU, NUM_TOKENS, PAGE = ReferenceOps(), torch.device("cpu"), 900, 16


class Streams:
    """`LayerOps` that keeps each layer's residual stream, before attention and before the MLP."""

    def __init__(self) -> None:
        self.seen: list[tuple[AttentionBlock, Tensor, Tensor]] = []

    def dense_layers(self, x_TH: Tensor, run: DenseLayers, kv: Sequence[Pages], rows: AttentionRows) -> Tensor:
        for (attention, mlp), pages in zip(run.layers, kv, strict=True):
            before, x_TH = x_TH, OPS.attention_block(x_TH, attention, *pages, rows)
            self.seen.append((attention, before, x_TH))
            hidden_TX = OPS.linear(OPS.rms_norm(x_TH, mlp.norm_H, mlp.eps), mlp.gate_up)
            x_TH = OPS.linear(OPS.silu_mul(hidden_TX), mlp.down, x_TH)
        return x_TH

    def attention_block(
        self, x_TH: Tensor, block: AttentionBlock, k_pages: Tensor, v_pages: Tensor, rows: AttentionRows
    ) -> Tensor:
        raise AssertionError("the embedded model has no experts")


def streams() -> list[tuple[AttentionBlock, Tensor, Tensor]]:
    """Of the first tokens of a source file."""
    folder = resolve_model("braid-tiny")
    model, streams = load_model(folder, OPS, torch.float32, CPU, False), Streams()
    text = (Path(__file__).parents[3] / "server" / "worker" / "worker.py").read_text()
    tokens = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:NUM_TOKENS])
    at, num_pages = torch.arange(NUM_TOKENS), -(-NUM_TOKENS // PAGE)
    table = torch.arange(num_pages, dtype=torch.int32)[None]
    spans = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    rows = AttentionRows(table, torch.zeros_like(at).int(), at.int(), at.int() + 1, at, spans)
    sizes = (num_pages, PAGE, model.config.num_kv_heads, model.config.head_dim, torch.float32, CPU)
    kv = [OPS.allocate_kv(*sizes) for _ in range(model.config.num_layers)]
    with torch.inference_mode():
        model.through(streams).forward(tokens, rows, kv)
    return streams.seen


def rotated(block: AttentionBlock, x_TH: Tensor) -> Tensor:
    """q and k [T, Q + K, D]."""
    heads = OPS.linear(OPS.rms_norm(x_TH, block.norm_H, block.eps), block.qkv).view(len(x_TH), -1, block.head_dim)
    q, k = heads[:, : block.num_q], heads[:, block.num_q : block.num_q + block.num_kv]
    if block.q_norm_D is not None and block.k_norm_D is not None:
        q, k = OPS.rms_norm(q, block.q_norm_D, block.eps), OPS.rms_norm(k, block.k_norm_D, block.eps)
    return rotate(torch.cat((q, k), dim=1), block.cos_sin_MR[: len(x_TH)].unsqueeze(1))


def held_mass(block: AttentionBlock, own_TH: Tensor, predicting_TH: Tensor) -> float:
    """Attention mass of the keys that the predicted query chooses / of those that the layer's own does, 1/16 of all."""
    own, predicted = rotated(block, own_TH), rotated(block, predicting_TH)
    keys, held, whole = own[:, block.num_q :], 0.0, 0.0
    for row in range(NUM_TOKENS // 2, NUM_TOKENS, 9):
        true, guess = (
            torch.einsum("kgd,nkd->kgn", of[row, : block.num_q].view(block.num_kv, -1, block.head_dim), keys[: row + 1])
            for of in (own, predicted)
        )
        mass = (true * block.scale).softmax(2).sum(1)[:, FIRST_KEYS : row + 1 - LAST_KEYS]
        for scores, is_own in ((true, True), (guess, False)):
            chosen = scores.amax(1)[:, FIRST_KEYS : row + 1 - LAST_KEYS].topk(row // 16).indices
            found = float(mass.gather(1, chosen).sum())
            whole, held = (whole + found, held) if is_own else (whole, held + found)
    return held / whole


def test_the_stream_before_the_mlp_predicts_better_than_the_one_before_the_layer() -> None:
    seen = streams()
    for number, least in ((2, 0.95), (3, 0.9)):
        block, own, _ = seen[number]
        _, before_layer, before_mlp = seen[number - 1]
        ours, papers = held_mass(block, own, before_mlp), held_mass(block, own, before_layer)
        assert ours > max(papers, least)
