"""Log-probabilities under the raw distribution: before penalties, constraints and temperature, in float32.

Computed row by row whatever the batch, so that a token's figure does not depend on its neighbours. The chosen token's
number and its entry among the best alternatives are read from the same float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scheduler.types import TokenLogprob
from server.worker.transfer import Download


class Weighed(NamedTuple):
    """What is reported of R rows, on its way to the host.

    tokens, ranks [R], chosen [R, 1]  the token to report, its rank (1 = most likely) and log-probability
    values, ids  [R, most]  of the best alternatives
    """

    tokens: Download
    ranks: Download
    chosen: Download
    values: Download
    ids: Download

    def told(self, num_top: Sequence[int]) -> list[TokenLogprob]:
        """One `TokenLogprob` per row, with `num_top` alternatives; equal ones in the order of their ids. Waits."""
        tokens, ranks, chosen, values, ids = (download.wait().tolist() for download in self)
        found = []
        for row, (token, rank, (logprob,)) in enumerate(zip(tokens, ranks, chosen, strict=True)):
            pairs = sorted(zip(ids[row], values[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
            found.append(TokenLogprob(token, logprob, rank, tuple(pairs[: num_top[row]])))
        return found


def weigh(logprobs_RV: Tensor, tokens_R: Tensor, most: int) -> Weighed:
    """The device's half of `token_logprobs`: nothing here waits for it. most: alternatives of any row."""
    chosen = logprobs_RV.gather(1, tokens_R.unsqueeze(1))
    ranks = (logprobs_RV > chosen).sum(dim=1).add_(1)
    best = torch.topk(logprobs_RV, min(most, logprobs_RV.shape[1]), dim=1)
    return Weighed(*map(Download, (tokens_R, ranks, chosen, best.values, best.indices)))


def token_logprobs(logprobs_RV: Tensor, tokens_R: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """One `TokenLogprob` per row.

    logprobs_RV  float32, log-softmax of the raw logits
    tokens_R     int64, the token to report
    num_top      how many of the best alternatives each row reports; equal ones in the order of their ids
    """
    return weigh(logprobs_RV, tokens_R, max(num_top, default=0)).told(num_top)
