"""`python -m kvindexer` is the command `kvindexer`."""

from __future__ import annotations

import sys

from kvindexer.cli import main

if __name__ == "__main__":
    sys.exit(main())
