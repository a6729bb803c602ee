"""The table that ends a run, and how tables are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.figures import Column, Figure, bearers, columns, figures, lost, number
from harness.report.marks import legend, letters
from harness.report.texts import said

SILENT = (("export", "none"), ("tune", "none"))  # choices that say nothing
CHECKLIST = (
    "a perplexity above 100 usually means one of: norm weights not fused before a rotation; an "
    "output head still tied to a rotated embedding; activations without a rotation, or clipped "
    "too far, at few bits; a learning rate or angle too large; a learned transform that should "
    "start from a Hadamard matrix (INT4) or from identity (NVFP4)"
)


def terminal() -> Console:
    """Standard output; a file or a pipe has no width of its own, and tables of 80 columns fold
    their names."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console()
    return Console(width=140)


def show(table: Table, console: Console) -> None:
    """Print a table; a file or a pipe gets it as wide as it needs, so that no figure is cut or
    folded."""
    if not console.is_terminal:
        console.width = max(
            console.width,
            console.measure(table, options=console.options.update(width=10_000)).maximum,
        )
    console.print(table)


def say(text: str) -> None:
    """A line on standard output."""
    line(terminal(), text)


def say_marks(rows: Iterable[Mapping]) -> None:
    """What the letters beside the figures of finished runs mean."""
    used = [
        text for row in rows if row["status"] == "done" for text in letters(row["marks"]).values()
    ]
    if legend(used):
        say(f"marks: {legend(used)}")


def print_table(title: str, columns: Iterable[str], cells: Iterable[Sequence[str]]) -> None:
    """Print a table of texts, wide ones folded."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for texts in cells:
        table.add_row(*map(Text, texts))
    terminal().print(table)


def _short(value: object) -> str:
    if isinstance(value, list):
        path = all(isinstance(one, float) for one in value)  # such as losses from start to end
        return (" -> " if path else ", ").join(map(_short, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def run_table(metrics: Mapping, directory: Path, console: Console | None = None) -> None:
    """One row a stage: its figures source by source, the difference to the untouched model beside
    those that have one, bits per weight, seconds, peak memory. Letters beside a number are its
    honesty marks."""
    console = console or terminal()
    stages = figures(metrics)
    shown = columns(stages.values())
    show(_stage_table(metrics, stages, shown), console)
    for row in said(metrics["stages"]):
        line(console, f"{row.pop('prompt')!r}")
        for stage, text in row.items():
            line(console, f"  {stage}: {text!r}")
    notes = {k: v for k, v in metrics.get("notes", {}).items() if k != "gate"}
    if notes:
        line(console, "transform: " + ", ".join(f"{k} {_short(v)}" for k, v in notes.items()))
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items())
    line(console, f"seconds: {seconds}")
    marks = metrics.get("marks", {})
    for name, letters_of in letters(marks).items():
        if marks[name]:
            line(console, f"{name} ({letters_of}): {', '.join(marks[name])}")
    for warning in metrics.get("warnings", []):
        line(console, f"warning: {warning}", style="yellow")
    untouched = stages.get("baseline", {})
    if any(lost(own, untouched) for own in stages.values()):
        line(console, CHECKLIST)
    export = metrics.get("export")
    if export:
        line(console, _exported(export))
    line(console, f"run directory: {directory}")


def _stage_table(
    metrics: Mapping, stages: Mapping[str, Mapping[Column, Figure]], shown: Sequence[Figure]
) -> Table:
    """The first column of a source names it, those after it belong to the same one."""
    labels = metrics["choices"] | metrics.get("holds", {})
    title = " · ".join(
        f"{group}={option}"
        for group, option in labels.items()
        if option and (group, option) not in SILENT
    )
    table = Table(title=Text(title), title_justify="left")
    table.add_column("stage")
    marks = bearers(shown, metrics.get("marks", {}))
    for figure in shown:
        add_column(table, figure.heading if figure.column in marks else figure.label, figure)
        if figure.display.change:
            table.add_column("Δ", justify="right", no_wrap=True)
    for column in ("bits", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    for name, own in stages.items():
        untouched = {} if name == "baseline" else stages.get("baseline", {})
        texts = []
        for figure in shown:
            texts.append(marked(named(own, figure), marks.get(figure.column)))
            if figure.display.change:
                texts.append(_change(own.get(figure.column), untouched.get(figure.column)))
        bits = metrics["bits_per_weight"] if name == "quantized" else None
        peak = metrics["peak_memory_mb"] if name == list(stages)[-1] else None
        seconds = metrics["seconds"].get(name)
        table.add_row(name, *texts, number(bits, 2), number(seconds, 1), number(peak, 0))
    return table


def add_column(table: Table, head: str, figure: Figure) -> None:
    """A column of figures; a narrow terminal may fold alternatives, which name themselves."""
    width = 9 if figure.display.change else None
    wraps = figure.display.alternative
    table.add_column(Text(head), justify="right", no_wrap=not wraps, min_width=width)


def named(own: Mapping[Column, Figure], column: Figure) -> str:
    """The text of a stage's figure in a column; empty where it has none."""
    if column.column not in own:
        return ""
    return own[column.column].named


def _change(figure: Figure | None, base: Figure | None) -> str:
    if figure is None or base is None:
        return ""
    return f"{figure.value - base.value:+.{figure.display.digits}f}"


def _exported(export: Mapping) -> str:
    sizes = export["sizes"]
    saved = sizes["reduction_percent"]
    change = "less" if saved >= 0 else "more"  # of a float32 model written as one
    return (
        f"exported: {export['path']} ({sizes['after'] / 1e6:.1f} MB of weights, untouched in "
        f"fp16 {sizes['before'] / 1e6:.1f}, {abs(saved):.1f} % {change})"
    )


def marked(text: str, marks: str | None) -> str:
    """`22.7512 cs`."""
    return f"{text} {marks}" if text and marks else text


def line(console: Console, text: str, style: str | None = None) -> None:
    """A line that no terminal folds, and of which nothing is taken for markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
