"""`python -m kernels.gpu_report`: one call that proves and times the GPU kernels on this machine. See README.md here.

Exit code 0 if all is right, 1 if a check failed or did not get to run, 2 without a GPU or triton: then nothing is
measured and nothing is claimed. A goal that was missed is a line of the report, not an exit code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

_IN_SECTIONS = 0.97
"""Of the time: the rest is for the imports before and for the end."""


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        say("torch and triton are needed: pip install torch triton")
        return 2
    if arguments.dry_run:
        # Before triton is imported: one process has interpreted or compiled kernels.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        say("No CUDA device here: nothing was checked on a GPU and nothing measured.")
        say("Without one, `make test` interprets the kernels and compiles them for sm_80, sm_90 and sm_100,")
        say("and `python -m kernels.gpu_report --dry-run` goes through the report's parts, without figures.")
        return 2
    torch.manual_seed(0)
    if arguments.tune is not None:
        from kernels.gpu_report.tune import tune

        return tune(arguments.tune, 60 * arguments.minutes, time.monotonic, say, arguments.dry_run)
    return _report(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from kernels.gpu_report.baselines import all_baselines
    from kernels.gpu_report.run import SECTIONS, Run, dry_setup, gpu_setup
    from kernels.gpu_report.timing import CudaTimer, HostTimer
    from kernels.triton.ops import TritonOps

    if arguments.dry_run:
        setup = dry_setup(TritonOps(num_programs=3), HostTimer(), all_baselines())
    else:
        setup = gpu_setup(TritonOps(), CudaTimer(), all_baselines())
    run = Run(setup, 60 * arguments.minutes * _IN_SECTIONS, time.monotonic, say, arguments.json)
    watchdog = run.watch()
    try:
        return run.all(arguments.only or SECTIONS)
    finally:
        watchdog.cancel()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.gpu_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="all the time there is (default: 9)")
    parser.add_argument(
        "--only",
        action="append",
        choices=("checks", "attention", "sparse", "serving"),
        help="this section; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, interpreted on the CPU; no figures")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="find tile shapes and write their table instead")
    return parser.parse_args(argv)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text} minutes; expected more than 0 and at most 600")
    return value


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
