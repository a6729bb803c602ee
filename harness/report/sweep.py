"""The end of a multirun: one table of all jobs, failed ones included, and the exit status that `on_error` asks for."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.experimental.callback import Callback

from harness.report.table import sweep_table
from harness.store import read_json, write_json


def record(sweep: Path, job: int, row: dict) -> None:
    """Keep a job's row until the sweep ends; jobs may run in other processes."""
    write_json(sweep / f"{job:05d}.json", {"job": job, **row})


def summary(metrics: dict) -> dict:
    """What the sweep's table shows of a run: status, perplexities and accuracies of its last stage, those of the untouched
    model and, where a transform changed the function, of the float model with its codecs; bits per weight; warnings."""
    stages = metrics["stages"]
    *_, last = list(stages.values()) or [{"ppl": {}}]
    last = last if metrics["status"] == "done" else {"ppl": {}}
    return {
        "status": metrics["status"], "ppl": last["ppl"], "zeroshot": last.get("zeroshot", {}),
        "baseline": stages.get("baseline", {}).get("ppl", {}), "transformed": stages.get("transformed", {}).get("ppl", {}),
        "bits_per_weight": metrics["bits_per_weight"], "warnings": metrics["warnings"],
    }


class SweepTable(Callback):
    """Hydra calls this once all jobs have ended."""

    def on_multirun_end(self, config, **kwargs) -> None:
        """Print the table; exit with status 1 when a job failed and `on_error=raise`."""
        records = (read_json(path) for path in sorted(Path(config.hydra.sweep.dir).glob("[0-9]*.json")))
        rows = [row for row in records if row]
        try:
            sweep_table(rows)
        finally:  # Hydra turns an exception of a callback into a warning; the exit status must not depend on a table
            if config.on_error != "record" and any(row["status"] != "done" for row in rows):
                sys.exit(1)
