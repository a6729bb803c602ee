"""How the command is written, for lines that are to be typed again."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from harness.config.options import checkout


def program() -> list[str]:
    """Its first words: those of a checkout, unless the installed command was called."""
    if checkout() is None or Path(sys.argv[0]).stem == "harness":
        return ["harness"]
    return ["python", "run.py"]


def again(words: Iterable[str]) -> str:
    """The line that gives these words to it."""
    return shlex.join([*program(), *words])
