"""What the worker is told about drafters at start. Data only."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_DRAFTERS = ("prediction", "grammar", "suffix")
"""`suffix` looks into the sequence's own text as well, so `history` beside it would only cost time."""

MASK_DRAFTER = "diffusion"
"""Asks mask rows that ride along in a decoding step (drafters/diffusion.py)."""


@dataclass(frozen=True, slots=True)
class SpeculatorConfig:
    """Which drafters are built (README.md lists their names) and what they may use.

    drafters      names, tried in order where several offer the same
    max_drafts    most drafts of one sequence in one step
    draft_model   a folder, an embedded name or a hub id for `draft_model`; same tokenizer as the target
    draft_stop    when a model drafter stops early: fixed (never), confidence or acc_head
    draft_tree    whether drafts may branch where the request does not say
    layer_subset  for `layer_subset`: uniform:<share of layers skipped>, search or exit
    store_bytes   memory of all lookup stores together
    store_file    where the shared stores are kept over a restart; None = nowhere
    synthetic_acceptance   for `synthetic`: the share of drafts that are right, in (0, 1]
    with_masks    `diffusion` joins the drafters where the model has masks as well as a causal mode
    """

    drafters: tuple[str, ...] = DEFAULT_DRAFTERS
    max_drafts: int = 8
    draft_model: str | None = None
    draft_stop: str = "confidence"
    draft_tree: bool = False
    layer_subset: str | None = None
    store_bytes: int = 256 << 20
    store_file: str | None = None
    synthetic_acceptance: float | None = None
    with_masks: bool = False
