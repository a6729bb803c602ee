"""How far a run is: a progress bar per stage on a terminal, lines elsewhere.

A plain line is written when a stage starts, at each tenth, and when it ends. In a sweep its own
bar, or line, stands above with the time gone and the time to expect.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Talks to a person on stderr, so that stdout stays free for the result table.

    sweep: (jobs done, jobs, when the sweep began in seconds since the epoch) where this run is one
    of several.
    """

    def __init__(self, console: Console | None = None, sweep: tuple[int, int, float] | None = None):
        self.console = console or Console(file=sys.stderr)
        self._sweep = sweep
        self._progress: Progress | None = None  # the bars on the terminal while a stage runs
        self._depth = 0
        if sweep is not None and not self.console.is_terminal:
            self.say(f"job {sweep[0] + 1} of {sweep[1]}{_expected(*sweep)}")

    def say(self, message: str) -> None:
        """One line."""
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields `advance(note="", steps=1)`, to be called for each of `total` steps. A stage
        within a stage has a bar below the outer one's while it runs; without a terminal it is
        silent."""
        self._depth += 1
        try:
            shown = self._bar if self.console.is_terminal else self._lines
            with shown(title, total) as advance:
                yield advance
        finally:
            self._depth -= 1

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as self._progress:
                if self._sweep is not None:
                    done, jobs, began = self._sweep
                    note = _expected(done, jobs, began)
                    self._progress.add_task("sweep", total=jobs, completed=done, note=note)
                try:
                    with self._task(self._progress, title, total) as advance:
                        yield advance
                finally:
                    self._progress = None
            return
        with self._task(self._progress, title, total) as advance:
            yield advance

    @contextmanager
    def _task(self, progress: Progress, title: str, total: int) -> Iterator[Callable[..., None]]:
        task = progress.add_task(title, total=total, note="")
        yield lambda note="", steps=1: progress.update(task, advance=steps, note=note)
        if self._depth > 1:
            progress.remove_task(task)

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        start = time.monotonic()
        done = 0
        shown = self._depth == 1
        if shown:
            self.say(f"{title}: {total} steps")

        def advance(note: str = "", steps: int = 1) -> None:
            nonlocal done
            done += steps
            if not shown or not steps:
                return
            if done == total or done * 10 // total > (done - 1) * 10 // total:
                said = f"; {note}" if note else ""
                self.say(f"{title}: {done}/{total} after {time.monotonic() - start:.0f} s{said}")

        yield advance


def _expected(done: int, jobs: int, began: float) -> str:
    """How long a sweep has run, and how much longer it takes if the other jobs are like those
    before."""
    if not done:
        return ""
    gone = time.time() - began
    return f", {clock(gone)} gone, about {clock(gone / done * (jobs - done))} to go"


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
