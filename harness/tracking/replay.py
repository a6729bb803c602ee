"""Stored runs sent to Weights & Biases later.

    python -m harness.tracking.replay RUNS [RUN_ID_PART ...] [--project P] ...

They go through the tracker that would have mirrored them while they ran, so the same run arrives:
config, group, tags, curves, tables, pages, summary, status. Where W&B has a run of the same id it
starts anew, so sending twice draws no curve twice.

Exit status: 0 all sent, or still running; 1 some could not be sent; 2 there is nothing to send.
Imports no torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from harness.config.errors import DataError
from harness.config.extras import installed, lacking
from harness.store import Run, RunLocked, Store, locked, read_json
from harness.tracking.base import RunInfo, Tracker
from harness.tracking.wandb import Wandb


@dataclass(frozen=True)
class Record:
    """All that a tracker was told of a run. curves: (step, values) of each call; status: done |
    failed | interrupted."""

    config: dict
    info: RunInfo
    curves: list[tuple[int, dict]]
    tables: dict[str, list[dict]]
    pages: list[Path]
    summary: dict
    status: str

    @classmethod
    def read(cls, run: Run) -> "Record":
        """From the run directory. Raises DataError, OSError or ValueError for what is missing or
        damaged."""
        folder = run.path / "tracking"
        status = run.status.get("status")
        if status in ("done", "failed"):
            summary = read_json(folder / "summary.json")
            if summary is None:
                raise DataError("tracking/summary.json is missing or damaged")
        else:  # nobody writes it any more; a summary there would be that of an earlier attempt
            status = "interrupted"
            summary = {}
        config = OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml"))
        if not isinstance(config, dict):
            raise DataError("config.yaml holds no settings")
        return cls(
            config=config,
            info=_info(run),
            curves=_curves(folder / "curves.jsonl"),
            tables={
                path.stem: _lines(path)
                for path in sorted(folder.glob("*.jsonl"))
                if path.name != "curves.jsonl"
            },
            pages=sorted(run.path.glob("*.html")),
            summary=summary,
            status=status,
        )

    def play(self, tracker: Tracker) -> None:
        """Tell the tracker everything, as the run would have."""
        tracker.start(self.config, self.info)
        for step, values in self.curves:
            tracker.log(values, step)
        for name, rows in self.tables.items():
            tracker.table(name, rows)
        for page in self.pages:
            tracker.page(page)
        tracker.finish(self.summary, self.status)


def send(run: Run, project: str | None, entity: str | None, mode: str | None) -> str:
    """Send one run; where it went. Raises RunLocked while the run is computed, and what Record.read
    raises.

    project, entity: None takes those of the run's own `tracking` section.
    """
    with locked(run.path / "lock"):
        record = Record.read(run)
        section = record.config.get("tracking") or {}
        tracker = Wandb(
            project=project or section.get("project"),
            entity=entity or section.get("entity"),
            name=section.get("name"),
            mode=mode,
            tags=section.get("tags") or (),
            resume=None,
        )
        record.play(tracker)
    counts = f"{len(record.curves)} points, {len(record.tables)} tables"
    return f"{record.status}, {counts} -> {tracker.address}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of a command line; one line a run on standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.tracking.replay", description="Send stored runs to W&B."
    )
    parser.add_argument("runs", type=Path, help="the run root")
    parser.add_argument("part", nargs="*", help="send only runs whose id contains one of these")
    parser.add_argument("--project", help="default: that of the run, WANDB_PROJECT, or low-bit")
    parser.add_argument(
        "--entity", help="default: that of the run, WANDB_ENTITY, or that of the login"
    )
    parser.add_argument(
        "--mode", choices=("online", "offline"), help="default: WANDB_MODE; offline without a login"
    )
    asked = parser.parse_intermixed_args(arguments)
    chosen = [
        run
        for run in Store(asked.runs).runs()
        if not asked.part or any(part in run.path.name for part in asked.part)
    ]
    if not chosen:
        print(
            f"error: {asked.runs} holds no run {' or '.join(asked.part)}".rstrip(), file=sys.stderr
        )
        return 2
    if not installed("wandb"):
        print(f"error: {lacking('wandb', parser.prog)}", file=sys.stderr)
        return 2
    lost = 0
    for run in chosen:
        try:
            told = send(run, asked.project, asked.entity, asked.mode)
        except RunLocked:
            told = "skipped: still running"
        except Exception as error:  # the other runs must not be lost with it
            # A YAML error has many lines.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            told = f"NOT SENT ({reason})"
            lost += 1
        print(f"{run.path.name}: {told}", flush=True)
    return 1 if lost else 0


def _info(run: Run) -> RunInfo:
    """Who the run was, from tracking/run.json; for runs stored before there was one, what their
    pipeline knew but the sweep."""
    known = read_json(run.path / "tracking" / "run.json")
    if known is None:
        choices = (run.metrics or {}).get("choices", {})
        tags = [
            f"{group}:{option}"
            for group, option in choices.items()
            if option and group != "tracking"
        ]
        known = {"run_id": run.path.name, "quant_id": run.status.get("quant_id"), "tags": tags}
    return RunInfo(**{**known, "tags": tuple(known["tags"]), "directory": run.path})


def _curves(path: Path) -> list[tuple[int, dict]]:
    """The points in the order in which they were logged; of a point logged again, as a resumed run
    does, only the last."""
    points: list[tuple[int, dict]] = []
    later: set[tuple[int, str]] = set()
    for line in reversed(_lines(path) if path.exists() else []):
        step = line.pop("step")
        values = {key: value for key, value in line.items() if (step, key) not in later}
        later |= {(step, key) for key in values}
        if values:
            points.append((step, values))
    return points[::-1]


def _lines(path: Path) -> list[dict]:
    """The rows of a file, without the half line that a kill can leave at its end."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


if __name__ == "__main__":
    sys.exit(main())
