"""`python -m apexlib COMMAND`."""

import sys

from apexlib.suite.command_line import main

if __name__ == "__main__":
    sys.exit(main())
