"""A step while it is being put together: spans, admissions, new pages, and what they will cost."""

from __future__ import annotations

from typing import NamedTuple

from scheduler.sequence import Sequence
from scheduler.types import Admission, Drafts, Read, Span, StepFeatures


class Backlog(NamedTuple):
    """Prompts that wait for a step.

    tokens       rows that could be computed now, about
    start        KV index from which the first prompt goes on
    num_prompts  unfinished and queued ones: sequences that will decode soon
    fewest       rows that the first one needs to go on at all
    """

    tokens: int
    start: int
    num_prompts: int
    fewest: int = 1


class Others(NamedTuple):
    """The other models of the engine that have work: their steps come between ours, and ours between theirs.

    num       models
    stream_s  predicted seconds of what their running streams ask of one step of each, without prompts or drafts
    """

    num: int = 0
    stream_s: float = 0.0


ALONE = Others()


class Verified(NamedTuple):
    """The span of `spans[row]` verifies the first `num_drafts` of `drafts`."""

    row: int
    drafts: Drafts
    num_drafts: int


class DraftPlan:
    """Collects one step. `spans` and `owners` run in parallel: decodes, then denoise spans, then prompts.

    num_denoise   rows of the denoise spans, of num_denoising sequences; denoise_value tokens they are expected to fix;
    lengths       tokens that each of these had before the step
    num_fused     rows of prompts' last chunks that denoise already
    host_s        seconds that the step before took beside the worker's; None = it was the first, or the engine waited
    planned_at_s, elapsed_s  when it was planned, and how long the worker took
    """

    def __init__(self, others: Others = ALONE, now: float = 0.0, host_s: float | None = None) -> None:
        self.others = others
        self.planned_at_s, self.elapsed_s = now, 0.0
        self.host_s = host_s
        self.spans: list[Span] = []
        self.owners: list[Sequence] = []
        self.admitted: list[Admission] = []
        self.new_pages: dict[int, list[int]] = {}
        self.budget = 0
        self.num_decodes = 0
        self.num_denoising = 0
        self.num_denoise = 0
        self.denoise_value = 0.0
        self.lengths: list[int] = []
        self.num_fused = 0
        self.num_prefill = 0
        self.num_recomputed = 0
        self.num_corrected = 0
        self.num_preempted = 0
        self.context_tokens = 0
        self.prefill_context = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.num_judged = 0
        self.num_drafts = 0
        self.draft_context = 0
        self.verified: list[Verified] = []
        self.num_asked = self.num_unseen = 0
        self.num_masks = self.num_masked = 0
        self.draft_depth = 0
        self.goodput = 0.0

    @property
    def features(self) -> StepFeatures:
        return StepFeatures(
            self.num_decodes + self.num_denoise + self.num_drafts + self.num_masks + self.num_prefill,
            self.num_prefill,
            self.num_decodes + self.num_denoising,
            self.context_tokens,
            self.prefill_context,
            self.num_drafts + self.num_judged,
            self.draft_context,
        )

    @property
    def streams(self) -> StepFeatures:
        """What the time between tokens is measured by before drafts and prompts join: the decodes, with a row for each
        that denoises; where nobody decodes, the denoise spans as they are."""
        if not self.num_decodes or not self.num_denoise:
            return self.features
        extra = self.num_denoise - self.num_denoising
        features = self.features
        return features._replace(tokens=features.tokens - extra, judged=0, draft_context=0)

    @property
    def ending(self) -> list[int]:
        """Rows of the prompts that end in this step, with a first token."""
        spans, owners = self.spans, self.owners
        rows = range(self.num_decodes, len(spans))
        return [row for row in rows if spans[row].read is Read.SAMPLE and spans[row].kv_len == len(owners[row].tokens)]

    def add_page(self, seq_id: int, page: int) -> None:
        """One entry per sequence: a worker takes them in once a step, so that it can repeat the step."""
        self.new_pages.setdefault(seq_id, []).append(page)

    def take_pages(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return tuple([(seq_id, tuple(pages)) for seq_id, pages in self.new_pages.items()])

    def place_prefill(self, seq: Sequence, num_tokens: int) -> None:
        """Add a chunk of at most `num_tokens` of a prompt."""
        span = seq.decoding.next_span(num_tokens)
        rows = len(span.tokens)
        self.spans.append(span)
        self.owners.append(seq)
        if span.denoise is not None:
            self.num_fused += rows - max(0, span.denoise.lo - span.start)
        self.num_prefill += rows
        self.num_judged += len(span.judged)
        self.num_corrected += rows * seq.is_correcting
        self.num_recomputed += max(0, min(span.kv_len, seq.high_water) - span.start)
        self.prefill_context += rows * span.start + rows * (rows + 1) // 2

    def place_denoise(self, seq: Sequence, span: Span, value: float) -> None:
        """Add a denoise span: a decode of many rows, expected to fix `value` tokens."""
        rows = len(span.tokens)
        self.spans.append(span)
        self.owners.append(seq)
        self.num_denoising += 1
        self.num_denoise += rows
        self.denoise_value += value
        self.lengths.append(len(seq.tokens))
        self.context_tokens += span.kv_len
        self.num_judged += max(0, len(span.judged) - 1)
        self.draft_context += (rows - 1) * span.kv_len

    def place_drafts(self, index: int, num_drafts: int, num_asked: int) -> None:
        """Let a decode verify its first `num_drafts` drafts, and ask for `num_asked` new ones as the step ends."""
        seq = self.owners[index]
        drafts = seq.decoding.drafts
        span = seq.decoding.next_span(1 + num_drafts, num_asked)
        self.spans[index] = span
        self.num_asked += num_asked > 0
        if span.read is Read.VERIFY and drafts is not None:
            num_drafts = len(span.tokens) - 1
            self.verified.append(Verified(index, drafts, num_drafts))
            self.num_drafts += num_drafts
            # The first row's keys are counted; the span's last row sees one more for each draft.
            self.context_tokens += num_drafts
            self.draft_context += num_drafts * span.kv_len

    def place_masks(self, index: int, num_masks: int) -> None:
        """Let so many mask rows follow a span that asks for drafts."""
        span = self.spans[index]
        self.spans[index] = span._replace(num_masks=num_masks)
        self.num_masks += num_masks
        self.num_masked += 1
        self.draft_context += num_masks * span.kv_len
