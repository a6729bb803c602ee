"""The tables that end a run and a sweep."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.figures import accuracy, kept, number
from harness.report.marks import legend, letters

LOST = 100  # a perplexity no working language model has
CHECKLIST = (
    "a perplexity above 100 usually means one of: norm weights not fused before a rotation; an output head still tied to a "
    "rotated embedding; activations without a rotation, or clipped too far, at few bits; a learning rate or angle too large; a "
    "learned transform that should start from a Hadamard matrix (INT4) or from identity (NVFP4)"
)


def terminal() -> Console:
    """Standard output; a file or a pipe has no width of its own, and tables of 80 columns fold their names."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


def show(table: Table, console: Console) -> None:
    """Print a table; a file or a pipe gets it as wide as it needs, so that no figure is cut or folded."""
    if not console.is_terminal:
        console.width = max(
            console.width,
            console.measure(table, options=console.options.update(width=10_000)).maximum,
        )
    console.print(table)


def _short(value) -> str:
    if isinstance(value, list):
        return (
            " -> ".join(map(_short, value))
            if all(isinstance(v, float) for v in value)
            else ", ".join(map(_short, value))
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_table(metrics: dict, directory: Path, console: Console | None = None) -> None:
    """One row a stage: perplexities, difference to the baseline, divergence from it, accuracies, bits per weight, seconds, peak
    memory. Letters beside a number are its honesty marks."""
    console = console or terminal()
    stages, marks = metrics["stages"], letters(metrics.get("marks", {}))
    corpora = list(dict.fromkeys(c for stage in stages.values() for c in stage["ppl"]))
    baseline = stages.get("baseline", {}).get("ppl", {})
    labels = metrics["choices"] | metrics.get("holds", {})
    table = Table(
        title=Text(" · ".join(f"{g}={o}" for g, o in labels.items() if o)), title_justify="left"
    )
    table.add_column("stage")
    diverges = any(stage.get("divergence") for stage in stages.values())
    for corpus in corpora:
        table.add_column(Text(f"ppl {corpus}"), justify="right", no_wrap=True, min_width=9)
        for name in ("Δ", "KL", "top-1 %")[: 3 if diverges else 1]:
            table.add_column(name, justify="right", no_wrap=True)
    tasks = list(
        dict.fromkeys(task for stage in stages.values() for task in stage.get("zeroshot", {}))
    )
    for task in tasks:
        table.add_column(Text(task), justify="right")
    for column in ("bits/weight", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        cells = [name]
        for corpus in corpora:
            ppl, base = stage["ppl"].get(corpus), baseline.get(corpus)
            change = "" if name == "baseline" or None in (ppl, base) else f"{ppl - base:+.4f}"
            cells += [_marked(number(ppl), marks.get(corpus)), change]
            moved = stage.get("divergence", {}).get(corpus, {})
            cells += (
                [number(moved.get("kl")), number(100 * moved["top1"], 1) if moved else ""]
                if diverges
                else []
            )
        cells += [
            _marked(accuracy(stage.get("zeroshot", {}).get(task)), marks.get(task))
            for task in tasks
        ]
        bits = metrics["bits_per_weight"] if name == "quantized" else None
        peak = metrics["peak_memory_mb"] if name == list(stages)[-1] else None
        table.add_row(
            *cells, number(bits, 2), number(metrics["seconds"].get(name), 1), number(peak, 0)
        )
    show(table, console)
    notes = {k: v for k, v in metrics.get("notes", {}).items() if k != "gate"}
    if notes:
        _line(console, "transform: " + ", ".join(f"{k} {_short(v)}" for k, v in notes.items()))
    _line(
        console,
        "seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items()),
    )
    for name, told in metrics.get("marks", {}).items():
        if told:
            _line(console, f"{name} ({marks[name]}): {', '.join(told)}")
    for warning in metrics.get("warnings", []):
        _line(console, f"warning: {warning}", style="yellow")
    if any(_lost(stage["ppl"], baseline) for stage in stages.values()):
        _line(console, CHECKLIST)
    left = metrics.get("export")
    if left:
        after, before, share = (
            left["sizes"][key] for key in ("after", "before", "reduction_percent")
        )
        _line(
            console,
            f"exported: {left['path']} ({after / 1e6:.1f} MB of weights, untouched in fp16 {before / 1e6:.1f}, "
            f"{share:.1f} % less)",
        )
    _line(console, f"run directory: {directory}")


def sweep_table(rows: list[dict], console: Console | None = None) -> None:
    """The untouched model, then one row a job: {"job", "overrides", "status"} and what report.sweep.summary adds.

    `float` columns hold the perplexity of the float model under a trained codec; `kept` is the share of the untouched model's
    accuracy, mean over tasks; `disk MB` is what an exported checkpoint's weights take; `run` is the end of the run's id.
    Overrides that all jobs share are left out; errors and warnings stand in lines of their own.
    """
    console = console or terminal()
    corpora = list(dict.fromkeys(c for row in rows for c in row.get("ppl", {})))
    changed = [c for c in corpora if any(c in row.get("transformed", {}) for row in rows)]
    diverges = [c for c in corpora if any(c in row.get("divergence", {}) for row in rows)]
    first = rows[0]["overrides"] if rows else []
    shared = (
        [override for override in first if all(override in row["overrides"] for row in rows)]
        if len(rows) > 1
        else []
    )
    table = Table(
        title=f"{len(rows)} jobs, {sum(row['status'] != 'done' for row in rows)} failed",
        title_justify="left",
    )
    table.add_column("job")
    table.add_column("overrides", overflow="fold")
    table.add_column("status")
    for label, columns in (("ppl", corpora), ("float", changed), ("KL", diverges)):
        for corpus in columns:
            table.add_column(
                Text(f"{label} {corpus}"),
                justify="right",
                no_wrap=True,
                min_width=9 if label != "KL" else None,
            )
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("zeroshot", {})))
    for task in tasks:
        table.add_column(Text(task), justify="right")
    if tasks:
        table.add_column("kept %", justify="right")
    table.add_column("bits/weight", justify="right")
    exported = any(row.get("disk_mb") for row in rows)
    if exported:
        table.add_column("disk MB", justify="right")
    table.add_column("run", overflow="fold")
    for base in {
        tuple(row.get("baseline", {}).items()): row for row in rows if row.get("baseline")
    }.values():
        answers = [accuracy(base.get("accuracy", {}).get(task)) for task in tasks] + [""] * bool(
            tasks
        )
        ppl = [number(base["baseline"].get(corpus)) for corpus in corpora]
        table.add_row(
            "",
            "untouched model",
            "",
            *ppl,
            *[""] * (len(changed) + len(diverges)),
            *answers,
            *[""] * (2 + exported),
        )
    for row in rows:
        status = "stored" if row.get("stored") and row["status"] == "done" else row["status"]
        marks = letters(row.get("marks", {}))
        cells = [
            _marked(number(row.get("ppl", {}).get(corpus)), marks.get(corpus)) for corpus in corpora
        ]
        cells += [number(row.get("transformed", {}).get(corpus)) for corpus in changed]
        cells += [
            number(row.get("divergence", {}).get(corpus, {}).get("kl")) for corpus in diverges
        ]
        cells += [
            _marked(accuracy(row.get("zeroshot", {}).get(task)), marks.get(task)) for task in tasks
        ]
        cells += [number(kept(row.get("zeroshot", {}), row.get("accuracy", {})), 1)] * bool(tasks)
        own = " ".join(override for override in row["overrides"] if override not in shared)
        style = "red" if row["status"] != "done" else None
        cells += [
            number(row.get("bits_per_weight"), 2),
            *[number(row.get("disk_mb"), 1)] * exported,
        ]
        run = Text((row.get("run_id") or "").rpartition("-")[2])
        table.add_row(str(row["job"]), Text(own), status, *cells, run, style=style)
    show(table, console)
    told = legend(text for row in rows for text in letters(row.get("marks", {})).values())
    if told:
        _line(console, f"marks: {told}")
    for row in rows:
        if row["status"] != "done":
            _line(console, f"job {row['job']} failed: {row['error']}")
    jobs: dict[str, list[str]] = {}
    for row in rows:
        for warning in row.get("warnings", []):
            jobs.setdefault(warning, []).append(str(row["job"]))
    for warning, numbers in jobs.items():
        _line(console, f"warning (job {', '.join(numbers)}): {warning}", style="yellow")
    if any(_lost(row.get("ppl", {}), row.get("baseline", {})) for row in rows):
        _line(console, CHECKLIST)
    _line(console, f"a row again: {shlex.join(['python', 'run.py', *shared])} <its overrides>")


def _marked(text: str, marks: str | None) -> str:
    """`22.7512 cs`."""
    return f"{text} {marks}" if text and marks else text


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _lost(ppl: dict, baseline: dict) -> bool:
    """Whether a model that worked does not any more; a perplexity that is not finite may stand as None."""
    return any(
        (x is None or not x <= LOST) and (baseline.get(corpus) or LOST) <= LOST
        for corpus, x in ppl.items()
    )
