"""Figures as they are shown: how many digits, which accuracy stands for a task, in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.evaluation.zeroshot import METRICS, shown
from harness.report.marks import letters
from harness.report.rows import last

FIGURES = (
    "ppl",
    "KL",
    "top-1",
    *METRICS,
    "bits/weight",
    "seconds",
    "peak",
)  # the first words of labels, in their order


def number(value, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def accuracy(figures: dict | None) -> str:
    """`acc_norm 41.2 ± 3.5` in percent: the metric by which a task is shown, with its standard error."""
    best = None if figures is None else shown(figures)
    if best is None:
        return ""
    error = figures.get(f"{best[0]}_stderr")
    return f"{best[0]} {100 * best[1]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def kept(accuracies: Mapping[str, Mapping], untouched: Mapping[str, Mapping]) -> float | None:
    """Accuracy over that of the untouched model, in percent, mean over the tasks; None without one."""
    shares = []
    for task, own in accuracies.items():
        best = shown(own)
        base = untouched.get(task, {}).get(best[0]) if best else None
        if base:
            shares.append(best[1] / base)
    return 100 * sum(shares) / len(shares) if shares else None


def figures(row: dict) -> dict[str, tuple[float | None, str]]:
    """{label: (value, as shown)} of the stage a run is judged by, nothing of it before the run is done; labels begin with
    a word of FIGURES; accuracies in percent."""
    stage, marks = last(row), letters(row["marks"])
    found = {
        f"ppl {name}": (x, f"{number(x)} {marks.get(name, '')}".strip())
        for name, x in stage["ppl"].items()
    }
    for name, own in (stage.get("divergence") or {}).items():
        found[f"KL {name}"] = own.get("kl"), number(own.get("kl"))
        found[f"top-1 {name}"] = own.get("top1"), number(own.get("top1"))
    for name, own in (stage.get("zeroshot") or {}).items():
        if (best := shown(own)) is not None:
            _, _, percent = accuracy(own).partition(" ")
            found[f"{best[0]} {name}"] = 100 * best[1], f"{percent} {marks.get(name, '')}".strip()
    seconds = sum(value or 0 for value in row["seconds"].values()) or None
    tail = (
        ("bits/weight", row["bits_per_weight"], 2),
        ("seconds", seconds, 1),
        ("peak MB", row["peak_memory_mb"], 0),
    )
    return found | {label: (value, number(value, digits)) for label, value, digits in tail}


def in_order(*found: Mapping[str, object]) -> list[str]:
    """All labels that occur, by kind."""
    return sorted(
        dict.fromkeys(label for own in found for label in own),
        key=lambda label: FIGURES.index(label.split()[0]),
    )
