"""`python -m kvlock` is the command `kvlock`."""

import sys

from kvlock.cli import main

if __name__ == "__main__":
    sys.exit(main())
