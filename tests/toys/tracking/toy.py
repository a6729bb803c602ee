"""The final numbers of a run in one line of text."""

import json
from pathlib import Path

from harness.tracking.base import RunInfo, Tracker, plain


class OneLine(Tracker):
    """Appends {"run_id", "status", summary ..} to a file. Relative paths are those of the
    command."""

    def __init__(self, file: str):
        self.file = Path(file)

    def start(self, config: dict, run: RunInfo) -> None:
        self.run_id = run.run_id

    def finish(self, summary: dict, status: str = "done") -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(
                json.dumps({"run_id": self.run_id, "status": status, **plain(summary)}) + "\n"
            )
