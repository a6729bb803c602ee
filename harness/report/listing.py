"""Runs as a table: choices, the settings that tell runs of the same choices apart, and the figures
of the last stage with their honesty marks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from harness.config.errors import ConfigError
from harness.report.figures import NONE, Cell, in_order, row_figures
from harness.report.rows import LABELS
from harness.report.selection import short_id
from harness.report.settings import apart, dotted
from harness.report.table import say_marks, show, terminal

STYLES = {"done": None, "running": "cyan"}  # of a line, by status; any other is red


def show_runs(rows: list[dict], sort: str | None) -> None:
    """Print it. sort: part of a figure's name, lowest first; raises ConfigError for no such one."""
    shown = {row["run_id"]: row_figures(row) for row in rows}
    labels = in_order(*shown.values())
    if sort:
        fitting = [label for label in labels if sort.lower() in label.lower()]
        if not fitting:
            raise ConfigError(f"--sort {sort}: no such figure; there are {', '.join(labels)}.")
        by = fitting[0]
        rows.sort(key=lambda row: _or_last(shown[row["run_id"]].get(by, NONE).value))
    minor = {label for own in shown.values() for label, cell in own.items() if cell.minor}
    labels = [label for label in labels if label not in minor]
    show(_listed(rows, shown, labels), terminal())
    say_marks(rows)


def _listed(
    rows: list[dict], shown: Mapping[str, Mapping[str, Cell]], labels: Sequence[str]
) -> Table:
    """A line a run. shown: {run id: its figures}; labels: those that have a column."""
    table = Table(
        title=f"{len(rows)} runs",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    settings = apart(rows, list(map(dotted, rows)))
    varying = ["settings"] if any(settings) else []
    for column in ("run", "status", *LABELS[1:], *varying):
        table.add_column(column)
    for label in labels:
        table.add_column(Text(label.replace(" ", "\n")), justify="right")
    table.add_column("started")
    for row, differs in zip(rows, settings):
        texts = [short_id(row), row["status"]]
        texts += [row["labels"].get(group) or "" for group in LABELS[1:]]
        texts += [differs for _ in varying]
        texts += [shown[row["run_id"]].get(label, NONE).text for label in labels]
        texts.append((row["started"] or "")[5:16].replace("T", " "))
        table.add_row(*map(Text, texts), style=STYLES.get(row["status"], "red"))
    return table


def _or_last(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        return math.inf
    return value
