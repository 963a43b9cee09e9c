"""`python -m muntin`: the command."""

import sys

from muntin.cli import main

if __name__ == "__main__":
    sys.exit(main())
