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
        self._progress: Progress | None = None  # the bars on the terminal while a stage runs
        self._depth = 0

    def say(self, message: str) -> None:
        """One line."""
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields `advance(note="")`, to be called once for each of `total` steps. A stage within a stage has a bar below the
        outer one's while it runs; without a terminal it is silent."""
        self._depth += 1
        try:
            with self._bar(title, total) if self.console.is_terminal else self._lines(title, total) as advance:
                yield advance
        finally:
            self._depth -= 1

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            with Progress(*columns, console=self.console) as self._progress:
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
        yield lambda note="": progress.update(task, advance=1, note=note)
        if self._depth > 1:
            progress.remove_task(task)

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        start, done, shown = time.monotonic(), 0, self._depth == 1
        if shown:
            self.say(f"{title}: {total} steps")

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            if not shown:
                return
            if done == total or done * 10 // total > (done - 1) * 10 // total:
                self.say(f"{title}: {done}/{total} after {time.monotonic() - start:.0f} s{'; ' + note if note else ''}")

        yield advance
