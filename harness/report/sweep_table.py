"""The table that ends a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.command_line import again
from harness.evaluation.records import stored
from harness.report.figures import Column, Figure, bearers, columns, figures, kept, lost, number
from harness.report.marks import legend, letters
from harness.report.rows import final_stage
from harness.report.table import CHECKLIST, add_column, line, marked, named, show, terminal

Figures = Mapping[Column, Figure]


def summary(metrics: Mapping) -> dict:
    """What the sweep's table shows of a run: status, the stage it is judged by, records of all its
    stages, bits per weight, marks, warnings."""
    row = {
        "status": metrics["status"],
        "final": final_stage(metrics),
        "records": [asdict(record) for record in stored(metrics)],
        "displays": metrics.get("displays", {}),
        "marks": metrics.get("marks", {}),
        "bits_per_weight": metrics["bits_per_weight"],
        "warnings": metrics["warnings"],
    }
    if metrics.get("export"):
        row["disk_mb"] = metrics["export"]["sizes"]["after"] / 1e6
    return row


def sweep_table(rows: Sequence[Mapping], console: Console | None = None) -> None:
    """The untouched model, then one row a job: {"job", "overrides", "status"} and `summary`.

    `float` columns hold the perplexity of the float model under a trained codec; `kept` is the
    share of the untouched model's accuracy, mean over tasks; `disk MB` is what an exported
    checkpoint's weights take; `run` is the end of the run's id. Overrides that all jobs share are
    left out; errors and warnings stand in lines of their own.
    """
    console = console or terminal()
    shared: list[str] = []
    if len(rows) > 1:
        first = rows[0]["overrides"]
        shared = [one for one in first if all(one in row["overrides"] for row in rows)]
    stages = [figures(row) for row in rows]
    show(_table(rows, stages, shared), console)
    told = legend(text for row in rows for text in letters(row.get("marks", {})).values())
    if told:
        line(console, f"marks: {told}")
    for row in rows:
        if row["status"] != "done":
            line(console, f"job {row['job']} failed: {row['error']}")
    jobs: dict[str, list[str]] = {}
    for row in rows:
        for warning in row.get("warnings", []):
            jobs.setdefault(warning, []).append(str(row["job"]))
    for warning, numbers in jobs.items():
        line(console, f"warning (job {', '.join(numbers)}): {warning}", style="yellow")
    if any(lost(_final(row, own), own.get("baseline", {})) for row, own in zip(rows, stages)):
        line(console, CHECKLIST)
    line(console, f"a row again: {again(shared)} <its overrides>")


def _table(
    rows: Sequence[Mapping], stages: Sequence[Mapping[str, Figures]], shared: Sequence[str]
) -> Table:
    """One kind of figure after the other, each over all sources."""
    finals = [_final(row, own) for row, own in zip(rows, stages)]
    shown = [figure for figure in columns(finals) if not figure.display.minor]
    shown.sort(key=lambda figure: figure.order)
    moved = [own.get("transformed", {}) for own in stages]
    floats = [
        figure
        for figure in shown
        if figure.display.change and any(figure.column in own for own in moved)
    ]
    tasks = any(figure.display.alternative for figure in shown)
    exported = any(row.get("disk_mb") for row in rows)
    failures = sum(row["status"] != "done" for row in rows)
    table = Table(title=f"{len(rows)} jobs, {failures} failed", title_justify="left")
    table.add_column("job")
    table.add_column("overrides", overflow="fold")
    table.add_column("status")
    for figure in shown:
        add_column(table, figure.heading, figure)
    for figure in floats:
        add_column(table, f"float {figure.record.source}", figure)
    if tasks:
        table.add_column("kept %", justify="right")
    table.add_column("bits", justify="right")
    if exported:
        table.add_column("disk MB", justify="right")
    table.add_column("run", overflow="fold")
    for base in _untouched(stages):
        texts = [named(base, figure) for figure in shown]
        table.add_row(
            "", "untouched model", "", *texts, *[""] * (len(floats) + tasks + exported + 2)
        )
    for row, own, final in zip(rows, stages, finals):
        is_stored = row.get("stored") and row["status"] == "done"
        bearing = bearers(shown, row.get("marks", {}))
        texts = [marked(named(final, one), bearing.get(one.column)) for one in shown]
        texts += [named(own.get("transformed", {}), one) for one in floats]
        if tasks:
            texts.append(number(kept(final, own.get("baseline", {})), 1))
        texts.append(number(row.get("bits_per_weight"), 2))
        if exported:
            texts.append(number(row.get("disk_mb"), 1))
        overrides = " ".join(one for one in row["overrides"] if one not in shared)
        table.add_row(
            str(row["job"]),
            Text(overrides),
            "stored" if is_stored else row["status"],
            *texts,
            Text((row.get("run_id") or "").rpartition("-")[2]),
            style="red" if row["status"] != "done" else None,
        )
    return table


def _final(row: Mapping, stages: Mapping[str, Figures]) -> Figures:
    return stages.get(row.get("final") or "", {})


def _untouched(stages: Sequence[Mapping[str, Figures]]) -> list[Figures]:
    """The untouched models of a sweep, each once: by what their changes are measured from."""
    found = {}
    for own in stages:
        base = own.get("baseline", {})
        mark = [(col, one.value) for col, one in base.items() if one.display.change]
        if mark:
            found[tuple(mark)] = base
    return list(found.values())
