"""The command `harness` of a checkout: see harness/command/main.py."""

import sys

from harness.command.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
