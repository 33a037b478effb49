"""Log-probabilities under the raw distribution: before penalties, constraints and temperature, in float32.

Computed row by row whatever the batch, so that a token's figure does not depend on its neighbours. The chosen token's
number and its entry among the best alternatives are read from the same float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scheduler.types import TokenLogprob


def token_logprobs(logprobs_RV: Tensor, tokens_R: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """One `TokenLogprob` per row.

    logprobs_RV  float32, log-softmax of the raw logits
    tokens_R     int64, the token to report
    num_top      how many of the best alternatives each row reports; equal ones in the order of their ids
    """
    chosen = logprobs_RV.gather(1, tokens_R.unsqueeze(1))
    ranks = (logprobs_RV > chosen).sum(dim=1).add_(1).tolist()
    most = min(max(num_top, default=0), logprobs_RV.shape[1])
    best = torch.topk(logprobs_RV, most, dim=1)
    values, ids = best.values.tolist(), best.indices.tolist()
    found = []
    for row, (token, logprob) in enumerate(zip(tokens_R.tolist(), chosen.squeeze(1).tolist(), strict=True)):
        pairs = sorted(zip(ids[row], values[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        found.append(TokenLogprob(token, logprob, ranks[row], tuple(pairs[: num_top[row]])))
    return found
