"""`python -m server [serve] [MODEL] [flags]` and `python -m server bench ...`: arguments to configuration to processes.

Nothing heavy is imported before the arguments are known to be good: a wrong flag answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """python -m server [serve] [MODEL] [flags]   serve a model (default: the embedded braid-tiny); serve --help
python -m server bench ...                load a running server and report; bench --help"""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 after a drain, 1 for a failure, 2 for a wrong command line."""
    command, rest = "serve", list(arguments)
    if rest and rest[0] in ("serve", "bench"):
        command, rest = rest[0], rest[1:]
    elif rest and rest[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "bench":
        from server.bench.cli import main as bench

        return int(bench(rest) or 0)
    return _serve(rest)


def _serve(arguments: list[str]) -> int:
    from server import flags

    try:
        config, should_print = flags.parse(arguments)
    except flags.ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    if should_print:
        print(flags.dump(config), end="")
        return 0
    from server.serve import serve

    return serve(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
