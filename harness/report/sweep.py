"""A multirun from its start to its end.

Which jobs, how far they are, one table and one page of all of them, failed ones included, and the
exit status that `on_error` asks for.

Hydra's own multirun composes the default options with every override first, and hands the same
overrides to every job; here a setting that only some of the chosen options have applies to those.
Hydra still composes, and its launchers launch.

    _sweeps/<sweep>/sweep.json     {"jobs", "overrides": of each, "started", "pid": of the process
                                   that launches}
    _sweeps/<sweep>/NNNNN.json     a finished job's row
    _sweeps/<sweep>/NNNNN.log      what it said, where jobs run in other processes
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.config.build import build
from harness.config.extras import installed, lacking, need
from harness.config.paths import expanded
from harness.config.search_path import composing
from harness.libraries.hydra import BasicLauncher, Callbacks, HydraContext, OverridesParser, jobs_of
from harness.report.page import write_page
from harness.report.progress import Reporter
from harness.report.sweep_table import sweep_table
from harness.store import read_record, write_record
from harness.tracking import RunInfo, Tracker

LAUNCHERS = {  # options of hydra/launcher that other packages run
    "local_pool": "hydra_plugins.hydra_joblib_launcher",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
}
PERIOD = 0.5  # seconds between looks at jobs in other processes


def record(sweep: Path, job: int, row: dict) -> None:
    """Keep a job's row until the sweep ends; jobs may run in other processes."""
    write_record(sweep / f"{job:05d}.json", {"job": job, **row})


def records(sweep: Path) -> list[dict]:
    """The rows kept so far."""
    return [row for row in map(read_record, sorted(sweep.glob("[0-9]*.json"))) if row]


def everyone(sweep: Path) -> list[dict]:
    """A row for every job: the one it kept, or that its process ended before it could."""
    rows = {row["job"]: row for row in records(sweep)}
    begun = read_record(sweep / "sweep.json") or {"overrides": []}
    lost = {
        "status": "failed",
        "error": "no process ended it (one was killed, for lack of memory?); "
        "the same command goes on",
    }
    return [
        rows.get(job, {"job": job, "overrides": overrides, **lost})
        for job, overrides in enumerate(begun["overrides"])
    ]


def reporter(sweep: Path, job: int) -> Reporter:
    """Who tells of a job: with the sweep's bar above its own in the process that launches, else a
    file beside its row."""
    begun = read_record(sweep / "sweep.json") or {
        "pid": os.getpid(),
        "jobs": job + 1,
        "started": time.time(),
    }
    if begun["pid"] == os.getpid():
        return Reporter(sweep=(len(records(sweep)), begun["jobs"], begun["started"]))
    path = sweep / f"{job:05d}.log"
    return Reporter(Console(file=open(path, "w", buffering=1, encoding="utf-8"), width=140))


def sweep(task: Callable, overrides: list[str]) -> int:
    """Run `task`, a function of a composed configuration, for every job of a sweep; print its
    table, write its page. Returns the exit status: 1 when a job failed and `on_error=raise`.

    Raises what Hydra raises for overrides that cannot be composed, and ConfigError for a launcher
    that is not installed, before anything is written.
    """
    for override in overrides:
        key, _, launcher = override.partition("=")
        if key == "hydra/launcher" and launcher in LAUNCHERS:
            need(LAUNCHERS[launcher], override)
    with composing():
        loader = GlobalHydra.instance().config_loader()
        compose = partial(loader.load_configuration, "config", run_mode=RunMode.MULTIRUN)
        words = [*overrides, "hydra.mode=MULTIRUN"]
        config, _, missing = _fitting(compose, words)
        folder = expanded(config.hydra.sweep.dir)
        if config.hydra.sweep.dir.startswith("~"):  # Hydra composes it for each job anew
            config, _, missing = _fitting(compose, [*words, f"hydra.sweep.dir='{folder}'"])
        unknown = [error for key, error in missing.items() if key.startswith("hydra.")]
        if unknown:  # which no job could have
            raise unknown[0]
        jobs = _jobs(loader, config, overrides)
        for earlier in folder.glob("[0-9]*.*"):  # where HARNESS_SWEEP names the folder
            earlier.unlink()
        begun = {"jobs": len(jobs), "overrides": jobs, "started": time.time(), "pid": os.getpid()}
        write_record(folder / "sweep.json", begun)
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(context, task, config)
        # BrokenExecutor: a worker was killed, and the pool gave up.
        with _watched(folder, len(jobs), launcher), suppress(BrokenExecutor):
            for job in launcher.launch(jobs, initial_job_idx=0):
                _ = job.return_value  # raises what the job did
        return _close(config, folder)


def swept(config: DictConfig, overrides: Iterable[str]) -> dict[str, str]:
    """{setting: its values} that a chosen option goes through, without those that the command line
    sets."""
    named = {_key(override) for override in overrides}
    return {
        key: values
        for key, values in (config.hydra.sweeper.get("params") or {}).items()
        if key not in named
    }


def _jobs(loader: ConfigLoader, config: DictConfig, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job: every combination, each without the settings that its options do
    not have.

    Raises Hydra's error for a setting that no job has.
    """
    parsed = OverridesParser.create().parse_overrides(
        [*(f"{k}={v}" for k, v in swept(config, overrides).items()), *overrides]
    )
    rows = jobs_of([one for one in parsed if not one.is_hydra_override()])
    fitted = [_fitting(partial(loader.load_sweep_config, config), row)[1:] for row in rows]
    for key, error in fitted[0][1].items():
        if all(key in missing for _, missing in fitted):
            raise error
    # Rows that lost a setting may have become alike: each is run once.
    once = {tuple(own) if missing else row: own for row, (own, missing) in enumerate(fitted)}
    return list(once.values())


def _fitting(
    compose: Callable[[list[str]], DictConfig], overrides: list[str]
) -> tuple[DictConfig, list[str], dict[str, Exception]]:
    """(the configuration, the overrides that it has a place for, {key: Hydra's error} of those that
    it has not)."""
    missing: dict[str, Exception] = {}
    while True:
        own = [override for override in overrides if _key(override) not in missing]
        try:
            return compose(own), own, missing
        except ConfigCompositionException as error:
            place = re.match(r"Could not override '([^']+)'", str(error))
            if place is None or place[1] not in map(_key, own):
                raise
            missing[place[1]] = error


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


@contextmanager
def _watched(folder: Path, jobs: int, launcher: Launcher) -> Iterator[None]:
    """While jobs run in other processes, show how far they are."""
    if isinstance(launcher, BasicLauncher):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, jobs, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(folder: Path, jobs: int, over: threading.Event) -> None:
    """The sweep's bar, and the last line of each job that runs."""
    with Reporter().stage("sweep", jobs) as advance:
        done = 0
        ended = False
        while not ended:
            ended = over.wait(PERIOD)
            finished = {row["job"] for row in records(folder)}
            logs = {int(path.stem): path for path in folder.glob("[0-9]*.log")}
            lines = [
                f"job {job}: {_last_line(path)}"
                for job, path in sorted(logs.items())
                if job not in finished
            ]
            for _ in range(len(finished) - done):
                advance()
            done = len(finished)
            advance(" | ".join(lines), steps=0)


def _close(config: DictConfig, folder: Path) -> int:
    """The table and the page of a sweep, of what it has; the exit status."""
    rows = everyone(folder)
    sweep_table(rows)
    _write_page(config, folder, {row["run_id"] for row in rows if row.get("run_id")})
    return int(config.on_error != "record" and any(row["status"] != "done" for row in rows))


def _write_page(config: DictConfig, folder: Path, runs: set[str]) -> None:
    """One page of the sweep's runs; W&B gets it as the artifact of a run of its own in the sweep's
    group."""
    path = folder / "report.html"
    paged = installed("plotly")
    if paged:
        write_page(expanded(config.run_root), path, runs)
    print(f"page: {path if paged else lacking('plotly', 'it')}")
    section = OmegaConf.to_container(config.tracking, resolve=True)
    assert isinstance(section, dict)  # a group is a mapping
    tracker = build({str(key): value for key, value in section.items()}, "tracking", Tracker)
    assert isinstance(tracker, Tracker)  # no part that 16 bits turn off
    tracker.start({}, RunInfo(folder.name, None, folder, group=folder.name, job_type="sweep"))
    if paged:
        tracker.page(path)
    tracker.finish({"runs": len(runs)})


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "begins"
