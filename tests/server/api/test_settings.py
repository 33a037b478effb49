"""The README's table of limits is the real one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from server.api.settings import ApiSettings, Limits, Timeouts

README = Path(__file__).resolve().parents[3] / "server" / "api" / "README.md"


def documented() -> dict[str, str]:
    table = README.read_text().split("## Limits")[1].split("## What")[0]
    found: dict[str, str] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            names = cells[0].split(", ")
            values = cells[1].split(", ") if len(names) > 1 else [cells[1]]
            found.update(zip(names, values if len(values) == len(names) else values * len(names), strict=True))
    return found


def test_every_limit_is_documented_with_its_default() -> None:
    table = documented()
    for settings in (Limits(), Timeouts()):
        for field in fields(settings):
            value = getattr(settings, field.name)
            assert field.name in table, field.name
            if value is not None:
                assert table[field.name] == str(value), field.name
    for name in ("max_requests", "max_queued_tokens", "text_threads", "text_queue"):
        assert name in table
    assert (ApiSettings(("m",)).text_threads, ApiSettings(("m",)).text_queue) == (2, 64)
