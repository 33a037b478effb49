"""From a span to the judged rows whose tokens it asks for: what each row's rules look at.

Nothing that happens here outlives the step: counts and matcher catch up with the history, drafts are only looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from scheduler.types import MAX_TREE_NODES, Read, Span, VerifyMode
from server.worker.grammar import GrammarMask
from server.worker.process_logits import JudgedRow
from server.worker.sequences import SequenceState

NO_TOKEN = -2
"""Stands for a draft that no row can ever sample: an id outside the vocabulary."""


class Judged(NamedTuple):
    """The rows of one span that tokens are read from, in span order: one to sample, or the last token and its drafts.

    first      offset of the first of them in the span
    drafts     tokens of the rows after the first; NO_TOKEN for ids outside the vocabulary
    parents    as `Span.parents`
    draft_q    float32 [len(drafts), V], what the drafts were drawn from; None = they were not drawn (one-hot)
    """

    rows: list[JudgedRow]
    first: int = 0
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    mode: VerifyMode = VerifyMode.COUPLED
    draft_q: Tensor | None = None


def judge(span: Span, state: SequenceState, vocab_size: int) -> Judged | str | None:
    """The rows to read tokens from, None if the span has none, or an error that ends the sequence.

    A SAMPLE span has one if its last judged row is that of the sequence's last known token.
    """
    if span.read is Read.SAMPLE:
        first = len(state.history) - 1 - span.start
        if not span.judged or first != span.judged[-1]:
            return None
    elif span.read is Read.VERIFY:
        first = 0
    else:
        return None
    if state.counts is not None:
        state.counts.catch_up(state.history)
    if state.matcher is not None and (error := state.matcher.catch_up(state.history)) is not None:
        return error
    if len(span.tokens) == 1 or span.read is not Read.VERIFY:
        counts = None if state.counts is None else state.counts.after()
        mask = None if state.matcher is None else state.matcher.masks([()])[0]
        num_output = len(state.history) - state.num_prompt
        return Judged([JudgedRow(state.recipe, state.history, num_output, counts, mask)], first)
    return _verified(span, state, vocab_size)


def _verified(span: Span, state: SequenceState, vocab_size: int) -> Judged:
    mode, draft_q = state.request.speculation.verify, state.draft_q_at.get(span.start)
    drafts = span.tokens[1:]
    if min(drafts) < 0 or max(drafts) >= vocab_size:
        drafts = tuple(draft if 0 <= draft < vocab_size else NO_TOKEN for draft in drafts)
    if mode is not VerifyMode.COUPLED and NO_TOKEN in drafts:
        # Rejection looks drafts up in distributions; that one is no token was known before any noise was drawn.
        drafts, draft_q = drafts[: drafts.index(NO_TOKEN)], None
    num_rows = 1 + len(drafts)
    num_output = len(state.history) - state.num_prompt
    # Rows behind an id outside the vocabulary are never reached, but they are computed.
    paths = draft_paths(in_vocabulary(span, vocab_size), num_rows)
    if state.matcher is None and state.counts is None:
        recipe, history = state.recipe, state.history
        rows = [JudgedRow(recipe, history, num_output + len(path), None, None, path) for path in paths]
    else:
        masks: Sequence[GrammarMask | None] = [None] * num_rows
        if state.matcher is not None:
            masks = state.matcher.masks(draft_paths(span, num_rows))
        rows = []
        for path, mask in zip(paths, masks, strict=True):
            counts = None if state.counts is None else state.counts.after(path)
            rows.append(JudgedRow(state.recipe, state.history, num_output + len(path), counts, mask, path))
    draft_q = None if draft_q is None else draft_q[: len(drafts)]
    return Judged(rows, 0, drafts, span.parents[:num_rows], mode, draft_q)


def in_parts(judged: list[tuple[int, Judged]], most_rows: int) -> Iterator[list[tuple[int, Judged]]]:
    """Spans whose rows are read together, at most `most_rows` unless one span has more: a span is never cut."""
    start = num_rows = 0
    for end, (_, one) in enumerate(judged):
        if num_rows + len(one.rows) > most_rows and num_rows:
            yield judged[start:end]
            start, num_rows = end, 0
        num_rows += len(one.rows)
    if num_rows:
        yield judged[start:]


def draft_paths(span: Span, num_rows: int) -> list[tuple[int, ...]]:
    """For each of the first tokens of a VERIFY span the drafts from the last known token to it, itself included."""
    if not span.parents:
        return [span.tokens[1:end] for end in range(1, num_rows + 1)]
    paths: list[tuple[int, ...]] = [()]
    for offset in range(1, num_rows):
        paths.append((*paths[span.parents[offset]], span.tokens[offset]))
    return paths


def embedded(spans: Sequence[Span], vocab_size: int) -> Sequence[Span]:
    """The spans as the model may see them; raises ValueError for VERIFY spans that break the rules of `Span`."""
    verify = Read.VERIFY
    verified = [index for index, span in enumerate(spans) if span.read is verify]
    if not verified:
        return spans
    embedded = list(spans)
    for index in verified:
        check_drafts(spans[index])
        embedded[index] = in_vocabulary(spans[index], vocab_size)
    return embedded


def in_vocabulary(span: Span, vocab_size: int) -> Span:
    """The span with drafts that are no ids of the model replaced: a drafter's mistake must not reach an embedding."""
    if min(span.tokens) >= 0 and max(span.tokens) < vocab_size:
        return span
    return span._replace(tokens=tuple(min(max(token, 0), vocab_size - 1) for token in span.tokens))


def check_drafts(span: Span) -> None:
    """Raise ValueError for a VERIFY span that breaks the rules of `Span`."""
    if span.judged != tuple(range(len(span.tokens))):
        raise ValueError(f"span of sequence {span.seq_id} is verified, so all of its rows must be judged")
    if span.parents and not _is_tree(span.parents, len(span.tokens)):
        raise ValueError(f"span of sequence {span.seq_id} has parents {span.parents}, which are no tree")
    if span.parents and len(span.parents) > MAX_TREE_NODES:
        raise ValueError(f"span of sequence {span.seq_id} is a tree of {len(span.parents)}; {MAX_TREE_NODES} at most")


def _is_tree(parents: tuple[int, ...], num_tokens: int) -> bool:
    if len(parents) != num_tokens or parents[0] != -1:
        return False
    return all(0 <= parent < offset for offset, parent in enumerate(parents[1:], 1))
