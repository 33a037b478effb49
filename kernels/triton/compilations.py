"""A count of the kernels that Triton compiles in this process: after warm-up it must not grow.

Triton calls a hook when a call of a kernel finds no binary for the types, constants and specialisations it came with,
whether the binary then comes from the compiler or from the cache on disk. Either way a request waits for it.
"""

from __future__ import annotations

import logging
from typing import Any

import triton

logger = logging.getLogger("braid.kernels")


class Compilations:
    """Counts from its construction on. A hook that was there before is still called. (Triton 3.6 to 3.9)"""

    def __init__(self) -> None:
        self.count = 0
        self._before = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = self._note

    def close(self) -> None:
        """Count no more."""
        triton.knobs.runtime.jit_post_compile_hook = self._before

    def _note(self, **details: Any) -> Any:
        self.count += 1
        logger.debug("compiled %s", details.get("repr"))
        return None if self._before is None else self._before(**details)
