"""One way to log, for both processes: a line per event on standard error, text or JSON; control characters escaped."""

from __future__ import annotations

import json
import logging
import sys
import time

MAX_MESSAGE = 16_384


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 WARNING server.engine.loop: message`; a traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # One event, one line: what a client sent may hold line breaks and terminal escapes (S-80).
        return escape(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; fields given by `extra={"fields": {...}}` are merged in."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE],
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def escape(text: str) -> str:
    """Control characters as backslash escapes, length capped."""
    if text.isprintable() and len(text) <= MAX_MESSAGE:
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:MAX_MESSAGE])


def configure_logging(log_format: str, level: str) -> None:
    """Install one handler on the root logger. A closed or full standard error never disturbs serving (R-26)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
