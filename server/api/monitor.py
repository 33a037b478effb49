"""Two things that run beside the requests: the event loop's lag is measured, and a busy server says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from scheduler.types import StepStats
from server.api.services import Services

logger = logging.getLogger(__name__)

LAG_INTERVAL_S = 0.05


class ThroughputMeter:
    """Sums steps between two status lines. `observe` is called for every step."""

    def __init__(self) -> None:
        self._generated = self._prefilled = self._queries = self._hits = 0
        self._since = time.monotonic()

    def observe(self, stats: StepStats) -> None:
        self._generated += stats.generated_tokens
        self._prefilled += stats.prefill_tokens
        self._queries += stats.prefix_queries
        self._hits += stats.prefix_hits

    def line(self, stats: StepStats) -> str | None:
        """The status line since the last one, or None if nothing ran."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-6)
        generated, prefilled, queries, hits = self._generated, self._prefilled, self._queries, self._hits
        self._generated = self._prefilled = self._queries = self._hits = 0
        self._since = now
        if not (generated or prefilled):
            return None
        kv = 100 * stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        hit_rate = f"{100 * hits / queries:.0f}%" if queries else "-"
        return (
            f"running={stats.num_running} waiting={stats.num_waiting} prompt_tok/s={prefilled / seconds:.0f} "
            f"output_tok/s={generated / seconds:.0f} kv={kv:.0f}% hit_rate={hit_rate}"
        )


@asynccontextmanager
async def monitoring(services: Services, meter: ThroughputMeter) -> AsyncIterator[None]:
    """Runs both tasks while the application is up."""
    tasks = [asyncio.create_task(_measure_lag(services)), asyncio.create_task(_report(services, meter))]
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


async def _report(services: Services, meter: ThroughputMeter) -> None:
    while True:
        await asyncio.sleep(services.settings.status_interval_s)
        line = meter.line(services.engine.stats)
        if line is not None:
            logger.info("%s", line)
