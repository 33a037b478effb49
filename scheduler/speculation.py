"""What is said about drafts: asked by requests, offered by drafters, told by steps. Part of the vocabulary:
`scheduler.types` hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

LEARN_MOST = 1024
"""Tokens that lookup drafters take in in one step, of all sequences together, some 0.5 ms: a long prompt is taken in
over several steps."""
MAX_TREE_NODES = 64
"""Tokens of a tree span, its root included: their visibility is one 64-bit mask per row."""


class SpeculationMode(StrEnum):
    """AUTO: as many drafts as finish the most tokens per second; ON: all that are offered; OFF: no drafter works."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class VerifyMode(StrEnum):
    """How drafts are accepted (speculative reference 2.2, 2.3).

    COUPLED    the target's own keyed sample is compared with the draft: the text does not depend on speculation
    REJECTION  token by token against the draft's distribution; BLOCK jointly. Same distribution, other samples
    """

    COUPLED = "coupled"
    REJECTION = "rejection"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a request asks of speculation.

    max_tokens  most drafts verified in one step; None = the server's limit
    drafter     a drafter's name, or "auto"
    tree        whether drafts may branch; None = the server decides
    prediction  ids of the text the client expects (OpenAI "predicted outputs"); drafts are looked up in it first
    """

    mode: SpeculationMode = SpeculationMode.AUTO
    max_tokens: int | None = None
    drafter: str = "auto"
    verify: VerifyMode = VerifyMode.COUPLED
    tree: bool | None = None
    prediction: tuple[int, ...] = ()


class Drafts(NamedTuple):
    """Tokens proposed after a sequence's last token, most likely first, parents before children.

    A span takes the first m of them: survivals never rise along the order, so that every such cut is a prefix of the
    chain, or a tree that still hangs together.

    survivals  for each the drafter's estimate that it is reached and accepted, in (0, 1]
    source     name of the drafter
    parents    of a tree: for each the index of its parent draft, -1 = the sequence's last token; () = a chain
    """

    tokens: tuple[int, ...]
    survivals: tuple[float, ...]
    source: str
    parents: tuple[int, ...] = ()


class DraftTally(NamedTuple):
    """How one step's drafts fared: of `source`, at `position` (1 = the first after the last token; depth in a tree).

    reached  drafts whose predecessors were all accepted; accepted of these. Drafts behind a rejected one tell nothing
    drafted  all that were verified there
    """

    source: str
    position: int
    reached: int
    accepted: int
    drafted: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationUsage:
    """What drafts of a request came to: verified, of these made output, and the steps that verified any.

    prediction_drafted, prediction_accepted   the part that was found in the request's own prediction
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    prediction_drafted: int = 0
    prediction_accepted: int = 0

    def __add__(self, other: SpeculationUsage) -> SpeculationUsage:
        return SpeculationUsage(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.steps + other.steps,
            self.prediction_drafted + other.prediction_drafted,
            self.prediction_accepted + other.prediction_accepted,
        )


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """How the scheduler speculates; None in its place = no drafter is loaded and nothing is ever drafted.

    policy         marginal, uniform, fixed (always `max_drafts`) or table
    max_drafts     most drafts of one sequence in one step
    table          for `table`: (most decoding sequences, drafts), ascending; beyond the last none
    has_sequential whether a drafter that runs a model step by step is loaded
    tree_max_seqs  trees are verified only while at most this many sequences decode
    probe_every    steps after which a request that is offered drafts has one of them verified, and a request that is
                   asked is asked with mask rows, whatever they pay; after 8 times as many without any, one is asked
    price          of a prompt token, in output tokens; None = learned from finished requests (0 = the myopic rule)
    mask_drafter, mask_block   name of the drafter that asks mask rows, and the model's block; "" = none is loaded
    """

    policy: str = "marginal"
    max_drafts: int = 8
    table: tuple[tuple[int, int], ...] = ()
    has_sequential: bool = False
    tree_max_seqs: int = 8
    probe_every: int = 32
    price: float | None = None
    mask_drafter: str = ""
    mask_block: int = 0
