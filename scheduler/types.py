"""The words every part of Braid shares: what a request is, what a step does, what comes back.

Data only, standard library only. The scheduler owns `Sequence`s (scheduler.py); everything here is immutable and may
be logged, replayed, sent between processes (msgpack) or fed to the simulator. Rules R1-R9 are in
`scheduler/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from scheduler.attention import Attention as Attention
from scheduler.attention import AttentionMethod as AttentionMethod
from scheduler.attention import AttentionOffer as AttentionOffer
from scheduler.attention import leaves_keys_out as leaves_keys_out
from scheduler.diffusion import Choice as Choice
from scheduler.diffusion import DecodingUsage as DecodingUsage
from scheduler.diffusion import Denoise as Denoise
from scheduler.diffusion import Denoised as Denoised
from scheduler.diffusion import Diffusion as Diffusion
from scheduler.diffusion import DiffusionModel as DiffusionModel
from scheduler.diffusion import EosRule as EosRule
from scheduler.diffusion import Snapshot as Snapshot
from scheduler.diffusion import Topology as Topology
from scheduler.features import StepFeatures as StepFeatures
from scheduler.features import StepSample as StepSample
from scheduler.limits import Limits as Limits
from scheduler.prompt_attention import PromptAttention as PromptAttention
from scheduler.prompt_attention import PromptMethod as PromptMethod
from scheduler.sampling import Grammar as Grammar
from scheduler.sampling import GrammarKind as GrammarKind
from scheduler.sampling import Sampling as Sampling
from scheduler.speculation import LEARN_MOST as LEARN_MOST
from scheduler.speculation import MAX_TREE_NODES as MAX_TREE_NODES
from scheduler.speculation import Drafts as Drafts
from scheduler.speculation import DraftTally as DraftTally
from scheduler.speculation import Speculation as Speculation
from scheduler.speculation import SpeculationMode as SpeculationMode
from scheduler.speculation import SpeculationSettings as SpeculationSettings
from scheduler.speculation import SpeculationUsage as SpeculationUsage
from scheduler.speculation import VerifyMode as VerifyMode
from scheduler.step_stats import StepStats as StepStats

MASK_ALL = 1 << 30
"""`mask_block` of a bidirectional span: every row sees every key of its sequence."""


UNKNOWN = -1
"""In the span of a step that is planned ahead: the token that the step before it will have sampled for the sequence."""


class Read(IntEnum):
    """What the worker makes of a span's judged rows."""

    NOTHING = 0
    SAMPLE = 1
    VERIFY = 2
    DENOISE = 3


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """One token string to continue. A client call with n samples or several prompts is several of these.

    id          ours, unique for the life of the front end
    prompt      token ids, at least one
    output      tokens already emitted before an engine restart; they count as output everywhere (penalties, noise
                positions, max_tokens), so a resubmitted request goes on exactly where it stopped
    max_tokens  output tokens, `output` included; 0 = only evaluate the prompt (echo + logprobs)
    stop_ids    end the output and are part of it (EOS included unless ignored); finish reason STOP
    priority    lower first
    cache_salt  prefix pages, and what drafters learn, are shared only between equal salts
    decoding    how it is denoised; None = autoregressive. model: the engine's name of the model, "" = its first
    attention, prompt_attention   how the rows of its output and of its prompt read fewer keys than they see; None = all
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    speculation: Speculation = field(default_factory=Speculation)
    decoding: Diffusion | None = None
    model: str = ""
    attention: Attention | None = None
    prompt_attention: PromptAttention | None = None


class Span(NamedTuple):
    """The query tokens one sequence brings to one step, over its own paged context.

    A NamedTuple, not a dataclass: a step makes hundreds, and one costs 0.3 us instead of 1.5 us.

    tokens      ids, in KV order
    start       KV index of tokens[0]; token j is written at index start + j
    kv_len      keys the sequence has after the span is written (= start + len(tokens) for a causal span)
    mask_block  the row at KV index i sees keys [0, min(kv_len, (i // mask_block + 1) * mask_block)); 1 = causal
    judged      offsets into `tokens` of the rows whose logits are read, ascending
    read        how they are read. SAMPLE: the row of the sequence's last known token is sampled; a judged row
                followed by a prompt token gives that token's prompt_logprobs and is not sampled. VERIFY: tokens are
                the last known token and drafts; every row is judged. DENOISE: as `denoise` says; with the model's
                shift s, the row at sequence position i answers for position i + s
    parents     of a draft tree: for each token the offset of its parent, -1 for tokens[0]; () = a chain. Token j of a
                tree is written at start + j, stands at position start + depth(j) and sees the keys before `start`, its
                ancestors and itself. At most `MAX_TREE_NODES` tokens
    num_drafts  most drafts wanted for the sequence's next span, proposed at the end of this step; 0 = no drafter works
    denoise     there if `read` is DENOISE
    dense_end   where the request's attention is sparse: rows before this KV index read everything, as the prompt's do
    positions   of a bidirectional span that brings only some rows: the sequence position (= KV index) of each token,
                ascending; () = start, start + 1, ...
    num_masks   rows of mask tokens behind the span, to the end of their block at most, whose answers are drafts
    """

    seq_id: int
    tokens: tuple[int, ...]
    start: int
    kv_len: int
    mask_block: int = 1
    judged: tuple[int, ...] = ()
    read: Read = Read.NOTHING
    parents: tuple[int, ...] = ()
    num_drafts: int = 0
    denoise: Denoise | None = None
    positions: tuple[int, ...] = ()
    dense_end: int = 0
    num_masks: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence the worker must know from this step on: its request and all its tokens so far (prompt + output)."""

    seq_id: int
    request: Request
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything the worker needs for one step: differences, not state. Apply releases, admissions, pages, then run.

    new_pages  (seq_id, page ids appended to its page table), admissions' first pages (prefix hits included) too
    released   sequences whose worker-side state is dropped (finished, aborted or preempted before this step)
    budget     the token budget this step was built under; predicted_s the step-time model's forecast (0 = none yet)
    draft_depth  most sequential draft steps a model drafter may take at the end of this step; 0 = it does not run
    after      the step before, if this one was planned ahead of its tokens: spans of one token may then be `UNKNOWN`
    """

    step: int
    spans: tuple[Span, ...]
    admitted: tuple[Admission, ...] = ()
    new_pages: tuple[tuple[int, tuple[int, ...]], ...] = ()
    released: tuple[int, ...] = ()
    budget: int = 0
    predicted_s: float = 0.0
    draft_depth: int = 0
    after: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(span.tokens) for span in self.spans)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the raw distribution, its rank (1 = most likely) and the best alternatives."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one span gave. `error` set: this sequence fails, its neighbours do not notice.

    tokens           sampled (SAMPLE), accepted + one (VERIFY), or one for each of `denoised.positions` (DENOISE)
    logprobs         one per token of `tokens` where the request asked
    prompt_logprobs  of the prompt tokens that follow this span's rows, in order (position start+1 ...)
    drafts           proposed for the next span, if the span asked and a drafter had any
    denoised         there for a DENOISE span
    """

    seq_id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None
    drafts: Drafts | None = None
    denoised: Denoised | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcomes in span order and the step's wall time in seconds; draft_s of these went into proposing drafts.

    num_compiled  kernels that had to be compiled in this step: none after warm-up
    """

    step: int
    outcomes: tuple[Outcome, ...]
    elapsed_s: float
    draft_s: float = 0.0
    num_compiled: int = 0


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Durations in seconds inside the engine (no clock crosses processes), sent with the last delta of a request."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request failed: an HTTP status (400 for the request's own fault, 500/503 for ours) and a plain sentence.

    code  for programs, where the status alone does not tell: "timeout" = it waited too long for its first step
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one request: tokens that can no longer change (R8), and its end.

    stop_id        the stop token that ended it, if one did
    cached_tokens  prompt tokens served by the prefix cache; sent with the first delta
    speculation    what the drafts verified for these tokens came to, None without any; a request's total is the sum
    decoding       what denoising took since the last delta, None for autoregressive requests; a total is the sum
    snapshot       the block as it stands, where the request asked for it
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    cached_tokens: int | None = None
    times: RequestTimes | None = None
    fault: Fault | None = None
    speculation: SpeculationUsage | None = None
    decoding: DecodingUsage | None = None
    snapshot: Snapshot | None = None
