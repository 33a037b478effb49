"""Which drafts of a VERIFY span stand, and which tokens the span gives. Pure decisions: no tensor of the model in here.

Coupled verification is the default (speculative reference, 2.2): the target draws its own token on every row with the
noise of that row's output position, and drafts only decide how many of those draws count. So the text is the one that
plain decoding gives, whatever was drafted, and greedy decoding is the same code at temperature 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Verdict(NamedTuple):
    """What a VERIFY span gives.

    tokens  the accepted drafts, then one token of the target's own: at least one, at most all drafts and one
    path    of each token the offset in the span of the row it comes from, ascending; path[0] = 0. The rows path[1:]
            are the accepted drafts: their KV belongs at start + 1, start + 2, ... and the last one's logits gave the
            last token
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]


def verify_coupled(samples: Sequence[int], drafts: Sequence[int], parents: Sequence[int] = ()) -> Verdict:
    """Follow the target's own tokens through the drafts for as long as they agree.

    samples  the token drawn on each row of the span, len(drafts) + 1 of them. A row behind a draft that the rules ban
             is never reached, so anything may stand there; so may -1 on a row that failed, which then ends the path
    drafts   tokens of rows 1, 2, ...
    parents  as `Span.parents`, () = a chain. Of children with the same token the first is taken
    """
    if not parents:
        num_accepted = 0
        for draft, sample in zip(drafts, samples, strict=False):
            if draft != sample:
                break
            num_accepted += 1
        return Verdict(tuple(samples[: num_accepted + 1]), tuple(range(num_accepted + 1)))
    path, tokens, at = [0], [samples[0]], 0
    # Parents come before their children, so one pass over the rows meets every node of the path in order.
    for row in range(1, len(parents)):
        if parents[row] == at and drafts[row - 1] == tokens[-1]:
            at = row
            path.append(row)
            tokens.append(samples[row])
    return Verdict(tuple(tokens), tuple(path))
