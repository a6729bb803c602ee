"""Curves, tables and summary as files under `<run directory>/tracking`, for any reader.

    run.json         who the run is: run_id, quant_id, group, tags, job_type
    curves.jsonl     one line a log call: {"step": 3, "block/error": 0.1, ...}; appended
    <table>.jsonl    one line a row; replaced as a whole
    summary.json     {"status": "done", ...}; replaced as a whole

With config.yaml beside them they are all that a tracker is told, so replay.py can tell another one
later. A resumed run appends to its curves, and a step logged again appears again: the last line
counts.
"""

import json
from pathlib import Path

from harness.store import append, whole_lines, write
from harness.tracking.base import RunInfo, Tracker, plain, plain_fields


class Local(Tracker):
    """The tracker that is always on."""

    def start(self, config: dict, run: RunInfo) -> None:
        self._directory = Path(run.directory) / "tracking"
        self._directory.mkdir(parents=True, exist_ok=True)
        who = {
            "run_id": run.run_id,
            "quant_id": run.quant_id,
            "group": run.group,
            "tags": run.tags,
            "job_type": run.job_type,
        }
        write(self._directory / "run.json", json.dumps(plain(who), indent=2) + "\n")
        self._curves = self._directory / "curves.jsonl"
        whole_lines(self._curves)

    def log(self, values: dict, step: int) -> None:
        append(self._curves, _line({"step": step, **values}))

    def table(self, name: str, rows: list[dict]) -> None:
        """`/` in the name becomes `_`. Raises ValueError for the name `curves`, whose file is
        taken."""
        if name == "curves":
            raise ValueError("a table cannot be named 'curves'; curves.jsonl holds the curves")
        lines = "".join(_line(row) + "\n" for row in rows)
        write(self._directory / f"{name.replace('/', '_')}.jsonl", lines)

    def finish(self, summary: dict, status: str = "done") -> None:
        fields = {"status": status, **plain_fields(summary)}
        write(self._directory / "summary.json", json.dumps(fields, indent=2) + "\n")


def _line(values: dict) -> str:
    return json.dumps(plain(values))
