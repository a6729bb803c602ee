"""A multirun from its start to its end: how many jobs, how far they are, one table and one page of all of them, failed ones
included, and the exit status that `on_error` asks for.

    _sweeps/<sweep>/sweep.json     {"jobs", "overrides": of each, "started", "pid": of the process that launches}
    _sweeps/<sweep>/NNNNN.json     a finished job's row;  NNNNN.log what it said, where jobs run in other processes
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf, flag_override
from rich.console import Console

from harness.config import build
from harness.report.page import write_page
from harness.report.progress import Reporter
from harness.report.table import sweep_table
from harness.store import read_json, write_json
from harness.tracking import RunInfo, Tracker

PERIOD = 0.5  # seconds between looks at jobs in other processes


def record(sweep: Path, job: int, row: dict) -> None:
    """Keep a job's row until the sweep ends; jobs may run in other processes."""
    write_json(sweep / f"{job:05d}.json", {"job": job, **row})


def records(sweep: Path) -> list[dict]:
    """The rows kept so far."""
    return [row for row in map(read_json, sorted(sweep.glob("[0-9]*.json"))) if row]


def everyone(sweep: Path) -> list[dict]:
    """A row for every job: the one it kept, or that its process ended before it could."""
    kept, begun = {row["job"]: row for row in records(sweep)}, read_json(sweep / "sweep.json") or {"overrides": []}
    lost = {"status": "failed", "error": "no process ended it (one was killed, for lack of memory?); the same command goes on"}
    return [kept.get(job, {"job": job, "overrides": own, **lost}) for job, own in enumerate(begun["overrides"])]


def summary(metrics: dict) -> dict:
    """What the sweep's table shows of a run: status, perplexities, divergences and accuracies of its last stage, those of the
    untouched model and, where a transform changed the function, of the float model with its codecs; bits per weight; marks;
    warnings."""
    stages = metrics["stages"]
    *_, last = list(stages.values()) or [{"ppl": {}}]
    last = last if metrics["status"] == "done" else {"ppl": {}}
    return {
        "status": metrics["status"], "ppl": last["ppl"], "zeroshot": last.get("zeroshot", {}),
        "divergence": last.get("divergence", {}), "marks": metrics.get("marks", {}),
        "baseline": stages.get("baseline", {}).get("ppl", {}), "transformed": stages.get("transformed", {}).get("ppl", {}),
        "accuracy": stages.get("baseline", {}).get("zeroshot", {}),
        "bits_per_weight": metrics["bits_per_weight"], "warnings": metrics["warnings"],
    } | ({"disk_mb": metrics["export"]["sizes"]["after"] / 1e6} if metrics.get("export") else {})


def reporter(sweep: Path, job: int) -> Reporter:
    """Who tells of a job: with the sweep's bar above its own in the process that launches, else a file beside its row."""
    begun = read_json(sweep / "sweep.json") or {"pid": os.getpid(), "jobs": job + 1, "started": time.time()}
    if begun["pid"] == os.getpid():
        return Reporter(sweep=(len(records(sweep)), begun["jobs"], begun["started"]))
    return Reporter(Console(file=open(sweep / f"{job:05d}.log", "w", buffering=1, encoding="utf-8"), width=140))


class SweepTable(Callback):
    """Hydra calls this before the first job and once all have ended."""

    def __getstate__(self) -> dict:
        """Nothing: launchers send it along with every job, and a thread cannot travel."""
        return {}

    def on_multirun_start(self, config, **kwargs) -> None:
        """Let a setting of the command line replace the one that an option sweeps over, and count the jobs."""
        given = config.hydra.overrides.task
        named = {override.partition("=")[0].lstrip("+") for override in given}
        swept = {key: value for key, value in (config.hydra.sweeper.get("params") or {}).items() if key not in named}
        with flag_override(config, "readonly", False):
            config.hydra.sweeper.params = swept or None
        parsed = OverridesParser.create().parse_overrides([*(f"{key}={value}" for key, value in swept.items()), *given])
        jobs = [list(own) for own in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
        self._folder, self._ended, self._watcher = Path(config.hydra.sweep.dir), threading.Event(), None
        for old in self._folder.glob("[0-9]*.*"):  # of an earlier sweep, where HARNESS_SWEEP names the folder
            old.unlink()
        begun = {"jobs": len(jobs), "overrides": jobs, "started": time.time(), "pid": os.getpid()}
        write_json(self._folder / "sweep.json", begun)
        HydraConfig.instance().set_config(config)  # for who ends the sweep where the launcher gives it up
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            self._watcher = threading.Thread(target=self._watch, args=(len(jobs),), daemon=True)
            self._watcher.start()

    def on_multirun_end(self, config, **kwargs) -> None:
        """Print the table, write the page; exit with status 1 when a job failed and `on_error=raise`."""
        if self._watcher is not None:
            self._ended.set()
            self._watcher.join()
        close(config)

    def _watch(self, jobs: int) -> None:
        """Show how far jobs in other processes are: the sweep's bar, and the last line of each that runs."""
        with Reporter().stage("sweep", jobs) as advance:
            done, ended = 0, False
            while not ended:
                ended = self._ended.wait(PERIOD)
                finished = {row["job"] for row in records(self._folder)}
                logs = {int(path.stem): path for path in self._folder.glob("[0-9]*.log")}
                lines = [f"job {job}: {_last_line(path)}" for job, path in sorted(logs.items()) if job not in finished]
                for _ in range(len(finished) - done):
                    advance()
                done = len(finished)
                advance(" | ".join(lines), steps=0)


def close(config) -> None:
    """The table and the page of a sweep, of what it has. SystemExit with status 1 when a job failed and `on_error=raise`."""
    folder = Path(config.hydra.sweep.dir)
    rows = everyone(folder)
    try:
        sweep_table(rows)
        _write_page(config, folder, {row["run_id"] for row in rows if row.get("run_id")})
    finally:  # Hydra turns an exception of a callback into a warning; the exit status must not depend on a table
        if config.on_error != "record" and any(row["status"] != "done" for row in rows):
            sys.exit(1)


def _write_page(config, folder: Path, runs: set[str]) -> None:
    """One page of the sweep's runs; W&B gets it as the artifact of a run of its own in the sweep's group."""
    path = write_page(Path(config.run_root), folder / "report.html", runs)
    print(f"page: {path}")
    tracker = build(OmegaConf.to_container(config.tracking, resolve=True), "tracking", Tracker)
    tracker.start({}, RunInfo(folder.name, None, folder, group=folder.name, job_type="sweep"))
    tracker.page(path)
    tracker.finish({"runs": len(runs)})


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "begins"
