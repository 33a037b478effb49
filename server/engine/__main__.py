"""`python -m server.engine`: the engine process. Started by `EngineClient`, which speaks to it over standard input."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

from server.engine.config import EngineConfig, EngineInfo
from server.engine.runner import Core, run_engine


def build(config: EngineConfig, wake: Callable[[], None]) -> tuple[Core, EngineInfo]:
    # Imported late: the process is bound to its parent's life and can report errors before torch is there.
    started_at = time.monotonic()
    from server.engine.loop import build_cores

    imported_s = time.monotonic() - started_at
    core, facts = build_cores(config, wake)
    return core, replace(facts, phases=(("import", imported_s), *facts.phases))


if __name__ == "__main__":
    sys.exit(run_engine(build))
