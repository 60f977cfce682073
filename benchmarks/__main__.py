"""`python -m benchmarks`."""

import sys

from benchmarks import cli

if __name__ == "__main__":
    try:
        sys.exit(cli.main())
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept, run the same command again for the rest", file=sys.stderr)
        sys.exit(130)
