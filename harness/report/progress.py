"""A progress bar per stage on a terminal; elsewhere one plain line when a stage starts, at each tenth, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Talks to a person on stderr, so that stdout stays free for the result table."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)

    def say(self, message: str) -> None:
        """One line."""
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields `advance(note="")`, to be called once for each of `total` steps."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(title, total=total, note="")
                yield lambda note="": progress.update(task, advance=1, note=note)
            return
        start, done = time.monotonic(), 0
        self.say(f"{title}: {total} steps")

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            if done == total or done * 10 // total > (done - 1) * 10 // total:
                self.say(f"{title}: {done}/{total} after {time.monotonic() - start:.0f} s{'; ' + note if note else ''}")

        yield advance
