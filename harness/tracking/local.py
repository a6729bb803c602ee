"""Curves, tables and summary as files under `<run directory>/tracking`, readable without any service.

    run.json         who the run is: run_id, quant_id, group, tags, job_type
    curves.jsonl     one line a log call: {"step": 3, "block/error": 0.1, ...}; appended
    <table>.jsonl    one line a row; replaced as a whole
    summary.json     {"status": "done", ...}; replaced as a whole

With config.yaml beside them they are all that a tracker is told, so replay.py can tell another one later.
What is replaced is written beside and renamed, so a reader or a kill never meets half a file. A resumed run appends to its
curves, and a step logged again appears again: the last line counts.
"""

import json
import os
from pathlib import Path

from harness.tracking.base import RunInfo, Tracker, plain


class Local(Tracker):
    """The tracker that is always on."""

    def start(self, config: dict, run: RunInfo) -> None:
        self._directory = Path(run.directory) / "tracking"
        self._directory.mkdir(parents=True, exist_ok=True)
        who = {"run_id": run.run_id, "quant_id": run.quant_id, "group": run.group, "tags": run.tags, "job_type": run.job_type}
        _replace(self._directory / "run.json", json.dumps(plain(who), indent=2) + "\n")
        self._curves = self._directory / "curves.jsonl"
        if self._curves.exists():
            # A kill can leave half a line; what is appended next must not be glued to it.
            whole, newline, _ = self._curves.read_bytes().rpartition(b"\n")
            _replace(self._curves, (whole + newline).decode())

    def log(self, values: dict, step: int) -> None:
        with self._curves.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))

    def table(self, name: str, rows: list[dict]) -> None:
        """`/` in the name becomes `_`. Raises ValueError for the name `curves`, whose file is taken."""
        if name == "curves":
            raise ValueError("a table cannot be named 'curves'; curves.jsonl holds the curves")
        _replace(self._directory / f"{name.replace('/', '_')}.jsonl", "".join(map(_line, rows)))

    def finish(self, summary: dict, status: str = "done") -> None:
        _replace(self._directory / "summary.json", json.dumps({"status": status, **plain(summary)}, indent=2) + "\n")


def _line(values: dict) -> str:
    return json.dumps(plain(values)) + "\n"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
