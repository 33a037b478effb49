"""A profile kept on disk, so that the second start of the same model on the same machine need not measure again.

Only a hint: what cannot be read or written is as if it were not there, and `measure_steps` believes nothing that its
first measurement contradicts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scheduler.types import StepFeatures, StepSample

logger = logging.getLogger(__name__)

MAX_FILES = 64
"""Profiles kept; beyond these the oldest go."""


class DiskMemory:
    """The profile of one model under one set of conditions, in a file of its own."""

    def __init__(self, folder: Path, conditions: Mapping[str, str | int]) -> None:
        """conditions: all that the time of a step depends on; a profile taken under others is never read."""
        self._conditions = dict(conditions)
        text = json.dumps(self._conditions, sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self) -> list[StepSample]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["conditions"] != self._conditions:
                return []
            return [_sample(entry) for entry in found["samples"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.info("the remembered profile %s is ignored: %s", self.path.name, error)
            return []

    def save(self, samples: Sequence[StepSample]) -> None:
        entries = [{"features": list(features), "seconds": seconds} for features, seconds in samples]
        text = json.dumps({"conditions": self._conditions, "samples": entries}, indent=1)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(text)
            for old in sorted(self.path.parent.glob("*.json"), key=_modified)[:-MAX_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.info("the profile is not remembered: %s", error)

    def _write(self, text: str) -> None:
        """Whole or not at all: another process may be reading, and several may write."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def default_folder() -> Path | None:
    """The user's private cache, None if there is no place for one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "braid" / "profiles"
    except RuntimeError:
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _sample(entry: Mapping[str, object]) -> StepSample:
    features, seconds = entry["features"], entry["seconds"]
    if not isinstance(features, list) or not all(isinstance(value, int) and value >= 0 for value in features):
        raise ValueError(f"features are {features!r}; expected integers")
    if not isinstance(seconds, float) or not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds are {seconds!r}; expected a positive number")
    if len(features) != len(StepFeatures._fields):
        raise ValueError(f"there are {len(features)} features; this version has {len(StepFeatures._fields)}")
    return StepSample(StepFeatures(*features), seconds)
