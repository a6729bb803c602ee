"""The command `harness`, which is `python run.py` of a checkout.

harness format=nvfp4 ...        a run, or with -m a sweep: run.py of this room
harness report ls ...           what `python -m harness.report` does; COMMANDS has the others
harness --version               of the package, with the commit where it is a checkout
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from harness.config.checks import nearest
from harness.store.provenance import commit, version

COMMANDS = {  # first word: the module whose `main` takes the others and returns the exit status
    "chat": "harness.chat.__main__",
    "lm_eval": "harness.lm_eval.__main__",
    "report": "harness.report.__main__",
    "structure": "harness.structure.__main__",
}


def main(words: Sequence[str] | None = None) -> int:
    """The exit status of a command line."""
    first, *more = (sys.argv[1:] if words is None else words) or [""]
    if first == "--version":
        print("harness", *filter(None, [version(), commit()]))
        return 0
    if first in COMMANDS:
        return import_module(COMMANDS[first]).main(more)
    if first.isidentifier():
        print(
            f"error: {first}: no such command.{nearest(first, COMMANDS)} Commands: "
            f"{', '.join(COMMANDS)}; a run takes group=option and field=value.",
            file=sys.stderr,
        )
        return 2
    from harness.command.run import run

    return run([first, *more] if first else [])
