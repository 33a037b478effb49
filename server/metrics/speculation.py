"""What drafts add to the metrics: counters to divide by each other, and gauges for a quick look.

Names of vLLM where they mean the same; `braid_spec_*` by drafter and position (1 = the first draft of a chain, depth in
a tree). Drafters are the engine's own names, positions end at the engine's limit: both sets are closed.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.types import StepStats
from server.metrics.families import Families

DECAY = 0.98
"""Per step with decodes: the gauges forget half within 34 steps."""
OTHER = "other"
UNDRAFTED = ("server", "request")


class SpeculationMetrics:
    """Counters, and means over the last steps.

    drafters, max_drafts   of the engine: the closed sets of labels
    """

    def __init__(self, make: Families, drafters: Sequence[str], max_drafts: int) -> None:
        self._max_drafts = max(1, max_drafts)
        self._drafts = make.counter("vllm:spec_decode_num_drafts", "Sequence steps that verified drafts")
        self._drafted = make.counter("vllm:spec_decode_num_draft_tokens", "Drafts verified")
        self._accepted = make.counter("vllm:spec_decode_num_accepted_tokens", "Drafts that became output")
        per_position = "vllm:spec_decode_num_accepted_tokens_per_pos"
        self._by_position = [
            make.counter(per_position, "Drafts that became output, by position from 0", position=str(position))
            for position in range(self._max_drafts)
        ]
        names = (*drafters, OTHER)
        self._of_drafter = {
            name: (
                make.counter("braid_spec_draft_tokens", "Drafts verified", drafter=name),
                make.counter("braid_spec_accepted_tokens", "Drafts that became output", drafter=name),
            )
            for name in names
        }
        self._of_position = {
            (name, position): (
                make.counter(
                    "braid_spec_reached_per_pos",
                    "Drafts whose predecessors were all accepted",
                    drafter=name,
                    position=str(position),
                ),
                make.counter("braid_spec_accepted_per_pos", "Of these, accepted", drafter=name, position=str(position)),
            )
            for name in names
            for position in range(1, self._max_drafts + 1)
        }
        self._draft_s = make.counter("braid_spec_draft_seconds", "Time spent on proposing drafts")
        self._disabled = {
            reason: make.counter("braid_spec_disabled", "Requests without drafts, by who wanted none", reason=reason)
            for reason in UNDRAFTED
        }
        self._make_gauges(make)

    def _make_gauges(self, make: Families) -> None:
        self._al = make.gauge("braid_spec_al", "Tokens per verified sequence step, its own one included (recent mean)")
        self._k_avg = make.gauge("braid_spec_k_avg", "Drafts verified per decoding sequence (recent mean)")
        self._waste = make.gauge("braid_spec_waste_ratio", "Share of verified drafts that were rejected (recent mean)")
        self._predicted = make.gauge("braid_goodput_predicted", "Planned tokens per second of decoding (recent mean)")
        self._observed = make.gauge("braid_goodput_observed", "Tokens per second of the same steps (recent mean)")
        self._recent_seqs = self._recent_drafted_seqs = self._recent_drafted = self._recent_accepted = 0.0
        self._recent_planned = self._recent_tokens = self._recent_s = 0.0

    def observe(self, stats: StepStats) -> None:
        """One engine step."""
        if stats.draft_s:
            self._draft_s.inc(stats.draft_s)
        if stats.draft_tokens:
            self._count(stats)
        if stats.decode_tokens:
            self._show_recent(stats)

    def count_undrafted(self, reason: str) -> None:
        """A request that gets no drafts because the `server` has no drafter, or the `request` said so."""
        self._disabled[reason].inc()

    def _count(self, stats: StepStats) -> None:
        self._drafts.inc(stats.drafted_seqs)
        self._drafted.inc(stats.draft_tokens)
        self._accepted.inc(stats.accepted_tokens)
        for tally in stats.drafts:
            name = tally.source if tally.source in self._of_drafter else OTHER
            position = min(max(1, tally.position), self._max_drafts)
            self._by_position[position - 1].inc(tally.accepted)
            drafted, accepted = self._of_drafter[name]
            drafted.inc(tally.drafted)
            accepted.inc(tally.accepted)
            reached, accepted_there = self._of_position[name, position]
            reached.inc(tally.reached)
            accepted_there.inc(tally.accepted)

    def _show_recent(self, stats: StepStats) -> None:
        self._recent_seqs = DECAY * self._recent_seqs + stats.decode_tokens
        self._recent_drafted_seqs = DECAY * self._recent_drafted_seqs + stats.drafted_seqs
        self._recent_drafted = DECAY * self._recent_drafted + stats.draft_tokens
        self._recent_accepted = DECAY * self._recent_accepted + stats.accepted_tokens
        self._k_avg.set(self._recent_drafted / self._recent_seqs)
        if self._recent_drafted_seqs > 0:
            self._al.set(1 + self._recent_accepted / self._recent_drafted_seqs)
        if self._recent_drafted > 0:
            self._waste.set(1 - self._recent_accepted / self._recent_drafted)
        if stats.goodput_predicted > 0 and stats.elapsed_s > 0:
            self._recent_planned = DECAY * self._recent_planned + stats.goodput_predicted * stats.elapsed_s
            self._recent_tokens = DECAY * self._recent_tokens + stats.decode_tokens + stats.accepted_tokens
            self._recent_s = DECAY * self._recent_s + stats.elapsed_s
            self._predicted.set(self._recent_planned / self._recent_s)
            self._observed.set(self._recent_tokens / self._recent_s)
