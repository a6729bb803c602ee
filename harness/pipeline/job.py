"""A run from its settings to its outcome: found done, or computed; the store knows how it ended.

    plan -> stored already? show it -> build and check -> compute (computation.py)
         -> metrics, trackers, table

A run that was killed goes on from its last finished block; a finished one is shown and not computed
again.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from harness import store as records
from harness.checkpoints.about import about, held
from harness.config.build import settings
from harness.config.errors import ConfigError, DataError
from harness.config.paths import expanded
from harness.evaluation.records import rows, stored, summary
from harness.parallel import ALONE, Ranks
from harness.pipeline.plan import Plan, make_plan
from harness.pipeline.state import Job
from harness.pipeline.unread import unread
from harness.report.progress import Reporter
from harness.report.texts import said
from harness.store import Run, Store
from harness.tracking import Local, RunInfo, Several

if TYPE_CHECKING:
    from harness.pipeline.build import Components


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` done | failed, whether its result was `stored` before, its metrics
    and directory."""

    status: str
    stored: bool
    metrics: dict
    run: Run
    error: str | None = None


def execute(
    cfg: DictConfig,
    choices: Mapping[str, str | None],
    sweep: str | None = None,
    reporter: Reporter | None = None,
    command: str | None = None,
    overrides: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run what `cfg` describes, or find it done.

    command: the line that runs it again; overrides: what it says of settings; ranks: the processes
    that compute it, each of which comes here. Raises ConfigError or
    DataError before anything is written when it cannot begin; an error after that is recorded in
    the run directory and returned.
    """
    if not ranks.first:
        reporter = Reporter(Console(quiet=True))
    reporter = reporter or Reporter()
    plan = make_plan(settings(cfg), choices, overrides)
    store = Store(plan.settings["run_root"], reporter.say, ranks)
    run = store.run(plan.run_id)
    metrics = ranks.lead(lambda: _result(plan, run))
    if metrics is not None:
        return _shown(plan, run, metrics)
    ranks.lead(store.check)
    plan.check()
    # Not before: it takes seconds to import torch.
    from harness.pipeline.build import components

    parts = components(plan)
    # A person is told at once who computes this; a job of a sweep may wait for another one.
    lock = records.locked(run.path / "lock", wait=sweep is not None, say=reporter.say)
    with ranks.leading(lock):
        metrics = ranks.lead(lambda: _result(plan, run))  # by who held the lock
        if metrics is not None:
            return _shown(plan, run, metrics)
        return Attempt.of(plan, parts, store, run, reporter, command, ranks).outcome(sweep)


def _result(plan: Plan, run: Run) -> dict | None:
    """The metrics that the store has of a run that is done, where the files that it was told to
    write are still its own."""
    if plan.settings["force"] or run.status.get("status") != "done":
        return None
    metrics = run.metrics
    if not metrics:
        return None
    exported = metrics.get("export")
    if exported is not None and about(Path(exported["path"])).get("run_id") != plan.run_id:
        return None  # another run has the name by now
    saved = plan.settings["transform"].get("save")
    if isinstance(saved, str):
        header = records.intact(Path(saved), run.damaged) or {}
        if json.loads(header.get("placement", "{}")).get("learned") != plan.learned_id:
            return None
    return metrics


def _shown(plan: Plan, run: Run, metrics: dict) -> Outcome:
    """A stored result, with what is to be said of settings that change none."""
    warnings = list(dict.fromkeys([*metrics["warnings"], *unread(plan)]))
    return Outcome("done", True, metrics | {"warnings": warnings}, run)


class Attempt(Job):
    """A run from its start to its end, whichever that is."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        parts: Components,
        store: Store,
        run: Run,
        reporter: Reporter,
        command: str | None,
        ranks: Ranks,
    ) -> Attempt:
        """One that has not begun. command: see `execute`."""
        if plan.settings["force"]:
            run.forget()
        # All fields from the start: readers of a run that failed early find each of them.
        metrics = {
            "run_id": plan.run_id,
            "quant_id": plan.quant_id,
            "baseline_id": plan.baseline_id,
            "status": "running",
            "choices": plan.choices,
            "command": command,
            "marks": {},
            "stages": {},
            "records": [],
            "bits_per_weight": None,
            "online": None,
            "seconds": {},
            "peak_memory_mb": None,
            "layers": [],
            "warnings": parts.warnings,
            "notes": {},
        }
        if plan.model.quantized:
            # The run quantizes nothing; what it measures was quantized by these.
            metrics["holds"] = held(expanded(plan.settings["model"]["path"]))
        tracker = Several([Local(), parts.tracker] if ranks.first else [])
        scratch = run.path / "scratch"
        if not ranks.first:
            scratch = scratch / str(ranks.rank)
        return cls(plan, parts, store, run, reporter, tracker, metrics, scratch, ranks)

    def outcome(self, sweep: str | None) -> Outcome:
        """Compute; whatever happens, the store knows how it ended."""
        _reset_peak_memory()
        new = not self.run.status
        refused = False
        self.run.start(
            self.plan.settings,
            {"quant_id": self.plan.quant_id, "sweep": sweep, "command": self.metrics["command"]},
        )
        self._start_tracker(sweep)
        error = None
        try:
            self._compute()
            self.metrics["status"] = "done"
        except BaseException as end:  # interrupts too: the store must not say `running`
            failure = self.ranks.cause(end)
            error = f"{type(failure).__name__}: {failure}"
            self.metrics["status"] = "failed"
            self.run.set_status(error=error, traceback=traceback.format_exc())
            # An input that is wrong is refused as if it had been found before the start.
            begun = bool(self.metrics["stages"])
            refused = isinstance(failure, ConfigError | DataError) and not begun
            if refused or not isinstance(failure, Exception):
                if failure is end:
                    raise
                raise failure from end
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.metrics["peak_memory_mb"] = _peak_memory()
            self.run.end(self.metrics)
            self._mirror()
            if refused and new and self.ranks.first:  # nothing was computed, and nothing is left
                with contextlib.suppress(OSError):
                    shutil.rmtree(records.aside(self.run.path, self.store.root))
        return Outcome(self.metrics["status"], False, self.metrics, self.run, error)

    def _compute(self) -> None:
        from harness.pipeline.computation import compute
        from harness.pipeline.devices import described, device

        name = self.plan.settings["device"]
        expected = self.plan.device_kind
        with device(name, self.store.root / "_shared" / "devices", self.ranks) as place:
            if place.type != expected:  # the run's id says otherwise
                raise ConfigError(
                    f"device={name}: the machine has {expected}, torch computes on {place.type}; "
                    f"set device={place.type}."
                )
            self.run.set_environment(compute=described(place) | {"ranks": self.ranks.count})
            compute(self, place)

    def _start_tracker(self, sweep: str | None) -> None:
        plan = self.plan
        tags = tuple(
            f"{group}:{option}"
            for group, option in plan.choices.items()
            if option and group != "tracking"
        )
        run = RunInfo(plan.run_id, plan.quant_id, self.run.path, group=sweep, tags=tags)
        self.tracker.start(plan.settings, run)

    def _mirror(self) -> None:
        """Send the final numbers to the trackers."""
        values = summary(stored(self.metrics))
        values |= {
            k: self.metrics[k] for k in ("bits_per_weight", "online", "peak_memory_mb", "status")
        }
        values |= {f"seconds/{stage}": s for stage, s in self.metrics["seconds"].items()}
        if self.metrics["layers"]:
            self.tracker.table("layers", self.metrics["layers"])
        for name, evaluation in self.plan.evaluations.items():
            figures = rows(name, self.metrics["stages"]) if evaluation.tabled else []
            if figures:
                self.tracker.table(name, figures)
        texts = said(self.metrics["stages"])
        if texts:
            self.tracker.table("texts", texts)
        self.tracker.finish(values, self.metrics["status"])


def _reset_peak_memory() -> None:
    """Forget what earlier jobs of this process needed, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory() -> float:
    """Most resident memory since the reset, in MB (since the start of the process where there is no
    reset)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
