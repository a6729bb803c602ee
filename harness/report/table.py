"""The tables that end a run and a sweep."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.evaluation.zeroshot import shown

LOST = 100  # a perplexity no working language model has
CHECKLIST = (
    "a perplexity above 100 usually means one of: norm weights not fused before a rotation; an output head still tied to a "
    "rotated embedding; activations without a rotation, or clipped too far, at few bits; a learning rate or angle too large; a "
    "learned transform that should start from a Hadamard matrix (INT4) or from identity (NVFP4)"
)


def _console() -> Console:
    """Standard output; a file or a pipe has no width of its own, and tables of 80 columns fold their names."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


def _number(value, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _accuracy(figures: dict | None) -> str:
    """`acc_norm 41.2 ± 3.5` in percent: the metric by which a task is shown, with its standard error."""
    best = None if figures is None else shown(figures)
    if best is None:
        return ""
    error = figures.get(f"{best[0]}_stderr")
    return f"{best[0]} {100 * best[1]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _short(value) -> str:
    if isinstance(value, list):
        return " -> ".join(map(_short, value)) if all(isinstance(v, float) for v in value) else ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    tasks = list(dict.fromkeys(task for stage in stages.values() for task in stage.get("zeroshot", {})))
    for task in tasks:
        table.add_column(Text(task), justify="right")
    for column in ("bits/weight", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        cells = [name]
        for corpus in corpora:
            ppl, base = stage["ppl"].get(corpus), baseline.get(corpus)
            cells += [_number(ppl), "" if name == "baseline" or None in (ppl, base) else f"{ppl - base:+.4f}"]
        cells += [_accuracy(stage.get("zeroshot", {}).get(task)) for task in tasks]
        bits = metrics["bits_per_weight"] if name in ("quantized", "exported") else None
        peak = metrics["peak_memory_mb"] if name == list(stages)[-1] else None
        table.add_row(*cells, _number(bits, 2), _number(metrics["seconds"].get(name), 1), _number(peak, 0))
    console.print(table)
    notes = {k: v for k, v in metrics.get("notes", {}).items() if k != "gate"}
    if notes:
        told = ", ".join(f"{k} {_short(v)}" for k, v in notes.items())
        console.print(f"transform: {told}", highlight=False, markup=False, soft_wrap=True)
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items())
    console.print(f"seconds: {seconds}", highlight=False)
    for warning in metrics.get("warnings", []):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if any(_lost(stage["ppl"], baseline) for stage in stages.values()):
        console.print(CHECKLIST, highlight=False, markup=False, soft_wrap=True)
    console.print(f"run directory: {directory}", highlight=False, markup=False, soft_wrap=True)


def sweep_table(rows: list[dict], console: Console | None = None) -> None:
    """The untouched model, then one row a job: {"job", "overrides", "status"} and what report.sweep.summary adds.

    `float` columns hold the perplexity of the float model under a trained codec. Overrides that all jobs share are left out;
    what went wrong, and warnings, stand in lines of their own below.
    """
    console = console or _console()
    corpora = list(dict.fromkeys(c for row in rows for c in row.get("ppl", {})))
    changed = [c for c in corpora if any(c in row.get("transformed", {}) for row in rows)]
    shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    table = Table(title=f"{len(rows)} jobs, {sum(row['status'] != 'done' for row in rows)} failed", title_justify="left")
    table.add_column("job")
    table.add_column("overrides", overflow="fold")
    table.add_column("status")
    for corpus in corpora:
        table.add_column(Text(f"ppl {corpus}"), justify="right", no_wrap=True, min_width=9)
    for corpus in changed:
        table.add_column(Text(f"float {corpus}"), justify="right", no_wrap=True, min_width=9)
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("zeroshot", {})))
    for task in tasks:
        table.add_column(Text(task), justify="right")
    table.add_column("bits/weight", justify="right")
    table.add_column("run", overflow="fold")
    for base in {tuple(row.get("baseline", {}).items()): row for row in rows if row.get("baseline")}:
        missing = [""] * (len(changed) + len(tasks) + 2)
        table.add_row("", "untouched model", "", *[_number(dict(base).get(c)) for c in corpora], *missing)
    for row in rows:
        status = "stored" if row.get("stored") and row["status"] == "done" else row["status"]
        ppl = [_number(row.get("ppl", {}).get(corpus)) for corpus in corpora]
        ppl += [_number(row.get("transformed", {}).get(corpus)) for corpus in changed]
        ppl += [_accuracy(row.get("zeroshot", {}).get(task)) for task in tasks]
        own = " ".join(override for override in row["overrides"] if override not in shared)
        style = "red" if row["status"] != "done" else None
        bits, run = _number(row.get("bits_per_weight"), 2), Text(row.get("run_id") or "")
        table.add_row(str(row["job"]), Text(own), status, *ppl, bits, run, style=style)
    console.print(table)
    for row in rows:
        if row["status"] != "done":
            console.print(f"job {row['job']} failed: {row['error']}", highlight=False, markup=False, soft_wrap=True)
    jobs: dict[str, list[str]] = {}
    for row in rows:
        for warning in row.get("warnings", []):
            jobs.setdefault(warning, []).append(str(row["job"]))
    for warning, numbers in jobs.items():
        line = f"warning (job {', '.join(numbers)}): {warning}"
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if any(_lost(row.get("ppl", {}), row.get("baseline", {})) for row in rows):
        console.print(CHECKLIST, highlight=False, markup=False, soft_wrap=True)


def _lost(ppl: dict, baseline: dict) -> bool:
    """Whether a model that worked does not any more."""
    return any(x > LOST >= baseline.get(corpus, LOST) for corpus, x in ppl.items())
