"""Wants made by hand, and an oracle target: it accepts a draft as long as it agrees with a text known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from scheduler.types import Drafts, Request, Sampling, Speculation
from server.worker.drafters.base import Drafter, RowTops, Want
from server.worker.drafters.build import build_speculator
from server.worker.drafters.config import SpeculatorConfig
from server.worker.drafters.speculator import Speculator
from server.worker.recipe import make_recipe
from server.worker.sequences import SequenceState

VOCAB = 1000


def make_state(
    tokens: Sequence[int],
    num_prompt: int = 1,
    salt: str = "",
    speculation: Speculation | None = None,
    sampling: Sampling | None = None,
    name: str = "r",
) -> SequenceState:
    request = Request(
        name,
        tuple(tokens[:num_prompt]),
        4096,
        sampling or Sampling(temperature=0.0),
        cache_salt=salt,
        speculation=speculation or Speculation(),
    )
    return SequenceState(request, make_recipe(request, ()), 0, list(tokens), 0)


def make_want(
    tokens: Sequence[int],
    num_drafts: int = 8,
    state: SequenceState | None = None,
    seq_id: int = 1,
    tops: RowTops | None = None,
    tree: bool = False,
) -> Want:
    state = state or make_state(tokens)
    state.history = list(tokens)
    return Want(seq_id, state, state.history, num_drafts, tops, tree)


def accepted(drafts: Drafts | None, truth: Sequence[int]) -> int:
    """How many drafts a target that writes `truth` accepts."""
    if drafts is None:
        return 0
    parents = drafts.parents or tuple(range(-1, len(drafts.tokens) - 1))
    children = {pair: node for node, pair in enumerate(zip(parents, drafts.tokens, strict=True))}
    node, count = -1, 0
    while count < len(truth) and (node, truth[count]) in children:
        node, count = children[node, truth[count]], count + 1
    return count


def replay(
    drafter: Drafter, text: Sequence[int], num_prompt: int, num_drafts: int = 8, state: SequenceState | None = None
) -> list[int]:
    """Generate text[num_prompt:] with the drafter and return how many tokens each step emitted."""
    state = state or make_state(text, num_prompt)
    emitted, length = [], num_prompt
    while length < len(text):
        (drafts,) = drafter.propose([make_want(text[:length], num_drafts, state)], 0)
        step = min(accepted(drafts, text[length:]) + 1, len(text) - length)
        emitted.append(step)
        length += step
    return emitted


def build_lookups(vocab_size: int = VOCAB, windows: tuple[int | None, ...] = (None,), **fields: Any) -> Speculator:
    """A real composite; lookup drafters need nothing of the model but its windows and its vocabulary."""
    model = SimpleNamespace(config=SimpleNamespace(windows=windows))
    parts = cast(Any, (model, None, None, None, SimpleNamespace(vocab_size=vocab_size)))
    return build_speculator(SpeculatorConfig(**fields), *parts)
