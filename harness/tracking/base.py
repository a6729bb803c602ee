"""What a tracker is.

Five calls; a null tracker instead of `if tracking`; and a failure in one never fails the run.

The store on disk is the truth and a tracker only its mirror, so losing one costs a curve and never
a result.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload, runtime_checkable

log = logging.getLogger(__name__)
SECRET = re.compile(r"secret|passw|credential|api[_-]?key|token(?!iz|s($|_))", re.IGNORECASE)
Plain = bool | int | float | str | None | list["Plain"] | dict[str, "Plain"]  # what JSON holds


@runtime_checkable
class Array(Protocol):
    """A tensor or an array, of whichever library."""

    def tolist(self) -> object: ...


@dataclass(frozen=True)
class RunInfo:
    """Who a run is. quant_id is shared by runs that only evaluate the same quantized model, None
    where nothing is quantized; group is the sweep, if any."""

    run_id: str
    quant_id: str | None
    directory: Path
    group: str | None = None
    tags: tuple[str, ...] = ()
    job_type: str = "run"


class Tracker:
    """The interface, and the null tracker: every call does nothing."""

    def start(self, config: dict, run: RunInfo) -> None:
        """Open the run. config: the resolved settings, nested."""

    def log(self, values: dict, step: int) -> None:
        """Points of curves, named `family/metric`; step counts within the family (the block, the
        optimizer step)."""

    def table(self, name: str, rows: list[dict]) -> None:
        """A whole table, one dict a row. The same name again replaces it."""

    def page(self, path: Path) -> None:
        """The report of the run, one HTML file that needs no other."""

    def finish(self, summary: dict, status: str = "done") -> None:
        """Close the run with its final numbers, nested; status is `done` or says how it ended
        instead."""


class Several(Tracker):
    """Forwards to all. A tracker that raises is left out from then on and `warn` is called once
    with the reason."""

    def __init__(self, trackers: Iterable[Tracker], warn: Callable[[str], None] = log.warning):
        self._trackers = list(trackers)
        self._warn = warn

    def start(self, config: dict, run: RunInfo) -> None:
        self._each("start", config, run)

    def log(self, values: dict, step: int) -> None:
        self._each("log", values, step)

    def table(self, name: str, rows: list[dict]) -> None:
        self._each("table", name, rows)

    def page(self, path: Path) -> None:
        self._each("page", path)

    def finish(self, summary: dict, status: str = "done") -> None:
        self._each("finish", summary, status)

    def _each(self, call: str, *arguments: object) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, call)(*arguments)
            except Exception as error:
                self._trackers.remove(tracker)
                reason = f"{type(error).__name__}: {error}"
                self._warn(
                    f"tracking: {type(tracker).__name__} failed in {call}; "
                    f"the run goes on without it ({reason})"
                )


def plain(value: object) -> Plain:
    """The value as JSON can hold it: tensors and arrays become numbers or lists, what is unknown
    becomes its string."""
    if isinstance(value, dict):
        return plain_fields(value)
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Array):
        return plain(value.tolist())
    return str(value)


def plain_fields(values: Mapping) -> dict[str, Plain]:
    """The same of a mapping."""
    return {str(key): plain(item) for key, item in values.items()}


@overload
def without_secrets(value: dict) -> dict: ...


@overload
def without_secrets(value: object) -> object: ...


def without_secrets(value: object) -> object:
    """A nested config without the keys that name a token, secret, password or API key; `tokenizer`
    and `max_tokens` stay."""
    if isinstance(value, dict):
        return {
            key: without_secrets(item) for key, item in value.items() if not SECRET.search(str(key))
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value
