"""Two things that run beside the requests: the event loop's lag is measured, and a busy server says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from scheduler.types import StepStats
from server.api.services import Services
from server.metrics import StepTotals

logger = logging.getLogger(__name__)

LAG_INTERVAL_S = 0.05


def status_line(since: StepTotals, now: StepTotals, seconds: float, stats: StepStats) -> str | None:
    """What happened between two readings of the totals, or None if nothing ran."""
    generated, prefilled = now.generated - since.generated, now.prefilled - since.prefilled
    queries, hits = now.prefix_queries - since.prefix_queries, now.prefix_hits - since.prefix_hits
    denoised = now.denoised - since.denoised
    if not (generated or prefilled or denoised):
        return None
    kv = 100 * stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    hit_rate = f"{100 * hits / queries:.0f}%" if queries else "-"
    drafted, accepted = now.drafted - since.drafted, now.accepted - since.accepted
    drafts = f" drafts={drafted / seconds:.0f}/s accepted={100 * accepted / drafted:.0f}%" if drafted else ""
    denoising = f" denoise_rows/s={denoised / seconds:.0f}" if denoised else ""
    return (
        f"running={stats.num_running} waiting={stats.num_waiting} prompt_tok/s={prefilled / seconds:.0f} "
        f"output_tok/s={generated / seconds:.0f} kv={kv:.0f}% hit_rate={hit_rate}"
        f"{drafts}{denoising}"
    )


@asynccontextmanager
async def monitoring(services: Services) -> AsyncIterator[None]:
    """Runs both tasks while the application is up."""
    tasks = [asyncio.create_task(_measure_lag(services)), asyncio.create_task(_report(services))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        services.pool.close()


async def _measure_lag(services: Services) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(LAG_INTERVAL_S)
        services.metrics.observe_lag(max(0.0, time.monotonic() - before - LAG_INTERVAL_S))


def _totals(services: Services) -> StepTotals:
    """Of all models together, as a value that no step changes."""
    return sum((its.metrics.totals for its in services.all), start=StepTotals())


async def _report(services: Services) -> None:
    before, at = _totals(services), time.monotonic()
    while True:
        await asyncio.sleep(services.settings.status_interval_s)
        totals, now = _totals(services), time.monotonic()
        line = status_line(before, totals, now - at, services.engine.stats)
        before, at = totals, now
        if line is not None:
            logger.info("%s", line)
