"""What the front end keeps of a request for the engine after the next: its speculation, and the count of its drafts."""

from __future__ import annotations

import asyncio

from scheduler.policies import make_diffusion
from scheduler.types import (
    DecodingUsage,
    Delta,
    FinishReason,
    Request,
    Speculation,
    SpeculationMode,
    SpeculationUsage,
    Topology,
)
from server.engine.coalesce import merge
from server.engine.in_flight import DeltaStream, InFlight

ASKED = Speculation(SpeculationMode.ON, 3, "prediction", prediction=(7, 8, 9))


def test_a_resubmission_asks_for_the_same_speculation_and_adds_its_drafts_to_those_before() -> None:
    async def run() -> None:
        stream = DeltaStream("r", lambda name: None)
        held = InFlight(Request("r", (1, 2), 10, speculation=ASKED), stream, 0.0)
        held.absorb(Delta("r", (3, 4, 5), cached_tokens=0, speculation=SpeculationUsage(3, 2, 1, 3, 2)))
        first = await stream.__anext__()
        held.note_crash(1.0)
        again = held.resubmission(2.0)
        assert again.speculation == ASKED
        assert again.output == (3, 4, 5)
        held.absorb(Delta("r", (6, 7), cached_tokens=0, speculation=SpeculationUsage(2, 1, 1)))
        last = Delta("r", (8,), finish_reason=FinishReason.LENGTH, speculation=SpeculationUsage(1, 0, 1))
        held.absorb(last)
        whole = merge([first, await stream.__anext__()])
        assert whole.tokens == (3, 4, 5, 6, 7, 8)
        assert whole.speculation == SpeculationUsage(6, 3, 3, 3, 2)

    asyncio.run(run())


def test_a_resubmission_denoises_as_before_and_its_usage_counts_what_was_done_twice() -> None:
    async def run() -> None:
        stream = DeltaStream("r", lambda name: None)
        asked = make_diffusion("localleap", Topology.BLOCK_CAUSAL, values={"radius": 2})
        held = InFlight(Request("r", (1, 2), 10, decoding=asked), stream, 0.0)
        held.absorb(Delta("r", (3,), cached_tokens=0, decoding=DecodingUsage(2, 0, 16)))
        first = await stream.__anext__()
        held.note_crash(1.0)
        again = held.resubmission(2.0)
        assert (again.decoding, again.output) == (asked, (3,))
        held.absorb(Delta("r", cached_tokens=0))
        held.absorb(Delta("r", decoding=DecodingUsage(2, 0, 16)))
        held.absorb(Delta("r", (4,), finish_reason=FinishReason.LENGTH, decoding=DecodingUsage(1, 1, 16)))
        whole = merge([first, await stream.__anext__()])
        assert (whole.tokens, whole.decoding) == ((3, 4), DecodingUsage(5, 1, 48))

    asyncio.run(run())
