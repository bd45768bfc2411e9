"""`python -m apexlib COMMAND`."""

import sys

from apexlib.suite.cli import main

if __name__ == "__main__":
    sys.exit(main())
