"""Everything about one run: stages, marks, the worst layers, outliers, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.report import rows as stored
from harness.report.figures import number
from harness.report.selection import unrecorded
from harness.report.table import print_table, run_table, say, terminal

WORST = 5  # layers that are named


def show_run(row: dict) -> None:
    """Print it."""
    say(f"{row['run_id']}  {row['status']}  started {row['started']}")
    say(f"command: {row['command'] or unrecorded(row)}")
    run_table(row, Path(row["path"]), terminal())
    for name, marks in row["marks"].items():
        if marks:
            say(f"mark {name}: {'; '.join(marks)}")
    measured = [layer for layer in row["layers"] if layer.get("rel_error") is not None]
    worst = sorted(measured, key=lambda layer: -layer["rel_error"])[:WORST]
    if worst:
        cells = [
            [layer["name"], number(layer["rel_error"], 6), number(layer.get("sqnr_db"), 2)]
            for layer in worst
        ]
        print_table("worst layers", ["layer", "relative error", "SQNR dB"], cells)
    _show_outliers((stored.outliers(row) or {}).get("rows") or [])
    if row["error"]:
        say(
            f"failed in stage {row['stage']}: {row['error']}\n"
            f"The traceback is in {Path(row['path']) / 'status.json'}."
        )


def _show_outliers(sites: list[dict]) -> None:
    """The site of the largest kurtosis before the transform, and after it."""
    cells = []
    for side in ("before", "after"):
        measured = [site for site in sites if (site.get(side) or {}).get("kurtosis") is not None]
        if measured:
            worst = max(measured, key=lambda site: site[side]["kurtosis"])
            place = f"layer {worst.get('layer')} {worst.get('site')}"
            moves = [_move(worst, figure) for figure in ("kurtosis", "max_over_median")]
            cells.append([f"worst {side}", place, *moves])
    if cells:
        print_table(
            "outliers, before -> after the transform", ["", "site", "kurtosis", "max/median"], cells
        )


def _move(site: Mapping, figure: str) -> str:
    """`88.0 -> 4.0`: before and after the transform."""
    sides = [(site.get(side) or {}).get(figure) for side in ("before", "after")]
    return " -> ".join(number(value, 1) for value in sides)
