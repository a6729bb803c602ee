"""Figures as they are shown: from the records of a run, by what their evaluations say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.evaluation.base import Display, Metric
from harness.evaluation.records import described, stored
from harness.report.marks import letters
from harness.report.rows import final_stage

Column = tuple[str, str, str]  # (evaluation, metric, source); all alternatives are the metric ""


@dataclass(frozen=True)
class Figure:
    """One record and how it is shown. order: (of its evaluation, of the metric in that)."""

    record: Metric
    display: Display
    order: tuple[int, int]

    @property
    def column(self) -> Column:
        """Where the same figure of another stage or run stands."""
        one = self.record
        metric = "" if self.display.alternative else one.metric
        return one.evaluation, metric, one.source

    @property
    def value(self) -> float:
        """In the unit in which it is shown."""
        return self.scale * self.record.value

    @property
    def scale(self) -> int:
        """Units in one: a share is shown in percent."""
        return 100 if self.display.percent else 1

    @property
    def text(self) -> str:
        """`41.2 ± 3.5`."""
        error = self.record.stderr
        shown = number(self.value, self.display.digits)
        if error is None:
            return shown
        return f"{shown} ± {number(self.scale * error, self.display.digits)}"

    @property
    def named(self) -> str:
        """The text, and before it which of the alternatives it is."""
        return f"{self.display.label} {self.text}" if self.display.alternative else self.text

    @property
    def label(self) -> str:
        """`top-1 %`: a word above its column; a column of alternatives is called by its source."""
        if self.display.percent and not self.display.alternative:
            return f"{self.display.label} %"
        return self.display.label

    @property
    def heading(self) -> str:
        """What stands above its column where no other column says its source."""
        source = self.record.source
        return source if self.display.alternative else f"{self.label} {source}"


@dataclass(frozen=True)
class Cell:
    """A figure of a run among those of other runs. order: by kind; minor: not for lists of runs."""

    value: float | None
    text: str
    order: tuple[int, int]
    minor: bool = False


NONE = Cell(None, "", (0, 0))  # of a run that has no such figure


def number(value: float | None, digits: int = 4) -> str:
    """`value` to so many digits after the point; nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}"


def figures(metrics: Mapping) -> dict[str, dict[Column, Figure]]:
    """{stage: {column: figure}} of what is shown of a run, in the order of its records."""
    displays = described(metrics)
    place = {name: index for index, name in enumerate(displays)}
    groups: dict[tuple[str, str, str], list[Metric]] = {}
    for record in stored(metrics):
        key = (record.stage, record.evaluation, record.source)
        groups.setdefault(key, []).append(record)
    stages: dict[str, dict[Column, Figure]] = {name: {} for name in metrics.get("stages") or {}}
    for (stage, evaluation, _), records in groups.items():
        own = displays.get(evaluation, {})
        order = place.get(evaluation, len(place))
        for rank, display, record in _shown(records, own):
            figure = Figure(record, display, (order, rank))
            stages.setdefault(stage, {})[figure.column] = figure
    return stages


def _shown(
    records: list[Metric], displays: Mapping[str, Display]
) -> list[tuple[int, Display, Metric]]:
    """(rank, display, record) of the metrics of one source that are shown: all of them, but of
    alternatives the first, and then none that nobody has described."""
    known = {metric: rank for rank, metric in enumerate(displays)}
    ranked = sorted(records, key=lambda record: known.get(record.metric, len(known)))
    alternatives = [
        record
        for record in ranked
        if record.metric in displays and displays[record.metric].alternative
    ]
    if alternatives:
        ranked = [
            record
            for record in ranked
            if record.metric in displays and record not in alternatives[1:]
        ]
    return [
        (
            known.get(record.metric, len(known)),
            displays.get(record.metric, Display(record.metric)),
            record,
        )
        for record in ranked
    ]


def columns(stages: Iterable[Mapping[Column, Figure]]) -> list[Figure]:
    """One figure for every column that occurs, source by source, as sources first occur."""
    occurring: dict[Column, Figure] = {}
    for figures in stages:
        for column, figure in figures.items():
            occurring.setdefault(column, figure)
    sources = list(dict.fromkeys(source for _, _, source in occurring))
    return sorted(
        occurring.values(),
        key=lambda figure: (sources.index(figure.record.source), figure.order),
    )


def bearers(shown: Iterable[Figure], marks: Mapping[str, Iterable[str]]) -> dict[Column, str]:
    """{column: letters}: the first figure of a source bears the source's honesty marks."""
    told = letters(marks)
    bearing: dict[str, Column] = {}
    for figure in shown:
        bearing.setdefault(figure.record.source, figure.column)
    return {column: told.get(source, "") for source, column in bearing.items()}


def kept(figures: Mapping[Column, Figure], untouched: Mapping[Column, Figure]) -> float | None:
    """Accuracy over that of the untouched model, in percent, mean over tasks; None without one."""
    shares = []
    for column, figure in figures.items():
        base = untouched.get(column)
        alike = base is not None and base.record.metric == figure.record.metric
        if figure.display.alternative and base is not None and alike and base.value:
            shares.append(figure.value / base.value)
    return 100 * sum(shares) / len(shares) if shares else None


def lost(figures: Mapping[Column, Figure], untouched: Mapping[Column, Figure]) -> bool:
    """Whether a model that worked does not any more."""
    for column, figure in figures.items():
        most = figure.display.lost
        if most is None or figure.value <= most:  # what is no number at all is lost, too
            continue
        base = untouched.get(column)
        if base is None or base.value <= most:
            return True
    return False


def row_figures(row: Mapping) -> dict[str, Cell]:
    """{label: cell} of the stage a run is judged by, nothing of it before the run is done."""
    shown = columns([figures(row).get(final_stage(row) or "", {})])
    marks = bearers(shown, row["marks"])
    found = {
        f"{figure.label} {figure.record.source}": Cell(
            figure.value,
            f"{figure.text} {marks.get(figure.column, '')}".strip(),
            figure.order,
            figure.display.minor,
        )
        for figure in shown
    }
    seconds = sum(value or 0 for value in row["seconds"].values()) or None
    share = row["online"]
    costs = (
        ("bits", row["bits_per_weight"], 2, False),
        ("online %", None if share is None else 100 * share, 1, False),
        ("seconds", seconds, 1, False),
        ("peak MB", row["peak_memory_mb"], 0, True),
    )
    for rank, (label, value, digits, minor) in enumerate(costs):
        found[label] = Cell(value, number(value, digits), (1000, rank), minor)  # after all figures
    return found


def in_order(*found: Mapping[str, Cell]) -> list[str]:
    """All labels that occur, by kind."""
    orders = {label: cell.order for own in reversed(found) for label, cell in own.items()}
    labels = list(dict.fromkeys(label for own in found for label in own))
    return sorted(labels, key=orders.__getitem__)
