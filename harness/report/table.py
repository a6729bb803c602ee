"""The tables that end a run and a sweep."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text


def _console() -> Console:
    """Standard output; a file or a pipe has no width of its own, and tables of 80 columns fold their names."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


def _number(value, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def run_table(metrics: dict, directory: Path, console: Console | None = None) -> None:
    """One row a stage: perplexities, difference to the baseline, bits per weight, seconds, peak memory."""
    console = console or _console()
    stages = metrics["stages"]
    corpora = list(dict.fromkeys(c for stage in stages.values() for c in stage["ppl"]))
    baseline = stages.get("baseline", {}).get("ppl", {})
    table = Table(title=Text(" · ".join(f"{g}={o}" for g, o in metrics["choices"].items() if o)), title_justify="left")
    table.add_column("stage")
    for corpus in corpora:
        table.add_column(Text(f"ppl {corpus}"), justify="right", no_wrap=True, min_width=9)
        table.add_column("Δ", justify="right", no_wrap=True)
    for column in ("bits/weight", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        cells = [name]
        for corpus in corpora:
            ppl, base = stage["ppl"].get(corpus), baseline.get(corpus)
            cells += [_number(ppl), "" if name == "baseline" or None in (ppl, base) else f"{ppl - base:+.4f}"]
        bits = metrics["bits_per_weight"] if name in ("quantized", "exported") else None
        peak = metrics["peak_memory_mb"] if name == list(stages)[-1] else None
        table.add_row(*cells, _number(bits, 2), _number(metrics["seconds"].get(name), 1), _number(peak, 0))
    console.print(table)
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items())
    console.print(f"seconds: {seconds}", highlight=False)
    for warning in metrics.get("warnings", []):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"run directory: {directory}", highlight=False, markup=False, soft_wrap=True)


def sweep_table(rows: list[dict], console: Console | None = None) -> None:
    """One row a job: {"overrides", "run_id", "status", "stored", "ppl": {corpus: x}, "bits_per_weight", "error"}.

    Overrides that all jobs share are left out; what went wrong stands in a line of its own below.
    """
    console = console or _console()
    corpora = list(dict.fromkeys(c for row in rows for c in row.get("ppl", {})))
    shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    table = Table(title=f"{len(rows)} jobs, {sum(row['status'] != 'done' for row in rows)} failed", title_justify="left")
    table.add_column("job")
    table.add_column("overrides", overflow="fold")
    table.add_column("status")
    for corpus in corpora:
        table.add_column(Text(f"ppl {corpus}"), justify="right", no_wrap=True, min_width=9)
    table.add_column("bits/weight", justify="right")
    table.add_column("run", overflow="fold")
    for row in rows:
        status = "stored" if row.get("stored") else row["status"]
        ppl = [_number(row.get("ppl", {}).get(corpus)) for corpus in corpora]
        own = " ".join(override for override in row["overrides"] if override not in shared)
        style = "red" if row["status"] != "done" else None
        bits, run = _number(row.get("bits_per_weight"), 2), Text(row.get("run_id") or "")
        table.add_row(str(row["job"]), Text(own), status, *ppl, bits, run, style=style)
    console.print(table)
    for row in rows:
        if row["status"] != "done":
            console.print(f"job {row['job']} failed: {row['error']}", highlight=False, markup=False, soft_wrap=True)
