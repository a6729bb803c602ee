"""Runs as rows, read from the store: what tables, the terminal and the page show of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.report import shapes
from harness.store import Run, Store, checked, held

LABELS = ("model", "format", "transform", "solver")  # what a run id begins with


def rows(root: str | Path) -> list[dict]:
    """Every run below `root`, oldest first."""
    return sorted(
        (row(run) for run in Store(root).runs()),
        key=lambda row: (row["started"] or "", row["run_id"]),
    )


def row(run: Run) -> dict:
    """metrics.json with what status.json adds: `status` done | failed | running | interrupted
    (nobody writes it any more) | broken (cannot be read), `stage`, `error`, `started`, `updated`
    (ISO 8601), `sweep`, `path`, the run directory, and `labels`, the choices as they are shown: of
    a checkpoint measured again those that made it. Fields a run never reached, or that are not what
    they should be, are empty."""
    try:
        status = shapes.sound(run.status, shapes.STATUS)
        metrics = shapes.metrics(run.metrics)
        state = status.get("status", "interrupted")
        if state == "running" and not held(run.path / "lock"):
            state = "interrupted"
    except (TypeError, ValueError, OSError) as error:
        status = {"error": f"cannot be read: {error}"}
        metrics = {}
        state = "broken"
    empty = {
        "quant_id": status.get("quant_id"),
        "baseline_id": None,
        "choices": {},
        "stages": {},
        "records": [],
        "displays": {},
        "bits_per_weight": None,
        "online": None,
        "seconds": {},
        "peak_memory_mb": None,
        "layers": [],
        "warnings": [],
        "marks": {},
        "notes": {},
        "holds": {},
        "command": status.get("command"),
    }
    known = {key: status.get(key) for key in ("stage", "error", "started", "updated", "sweep")}
    known |= {"run_id": run.path.name, "status": state, "path": str(run.path)}
    # A run that never wrote its choices still says them in its id.
    choices: dict[str, str | None] = dict(zip(LABELS, run.path.name.rsplit("-", 4)))
    choices |= metrics.get("choices", {})
    labels = choices | metrics.get("holds", {})
    return {**empty, **metrics, **known, "choices": choices, "labels": labels}


def final_stage(row: Mapping) -> str | None:
    """The stage by whose figures a row is judged: the last one of a finished run, else none."""
    if row["status"] != "done":
        return None
    return next(reversed(row["stages"]), None)


def last(row: Mapping) -> dict:
    """The record of that stage, or nothing."""
    return row["stages"].get(final_stage(row), {})


def outliers(row: dict) -> dict | None:
    """The run's outliers.json: activations before and after the transform."""
    return Run(Path(row["path"])).read("outliers.json")


def samples(row: dict, task: str) -> list[dict] | None:
    """What every document of a task got in the stage the run is judged by; None where that was not
    kept."""
    stage = next(reversed(row["stages"]), None)
    folder = Path(row["path"]) / "samples" / str(stage)
    if stage == "baseline":  # shared by all runs of the model
        store = Store(Path(row["path"]).parent)
        folder = store.shared("baselines", str(row["baseline_id"])).with_suffix("")
    digests = row["stages"].get(stage, {}).get("samples") or {}
    return checked(folder / f"{task}.json", digests.get(task))
