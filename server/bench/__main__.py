"""`python -m server.bench` = `python -m server bench`, where only tqdm is installed."""

import sys

from server.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
