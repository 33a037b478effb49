"""llguidance, imported with the first grammar: where it is missing the engine serves all but structured output."""

from __future__ import annotations

from typing import Any


def llguidance() -> Any:
    """The library with its numpy part. Raises ValueError, a sentence for the user, where it is not installed."""
    try:
        import llguidance.numpy
    except ImportError as error:
        raise ValueError("structured output needs llguidance, which is not installed here") from error
    return llguidance
