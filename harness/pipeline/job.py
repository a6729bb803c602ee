"""The order of a run's stages, and the record of them; stages.py says what each does to the model.

    plan -> stored already? show it -> build and check -> load -> baseline -> transform, fold, gate
         -> blocks: statistics, solve, swap, save -> evaluate -> metrics, trackers, table

A run that was killed goes on from its last finished block; a finished one is shown and not computed again.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import store as records
from harness.checkpoints.about import about, held
from harness.config.build import settings
from harness.config.errors import ConfigError, DataError
from harness.evaluation.caveats import marks
from harness.evaluation.records import rows, stored, summary
from harness.pipeline.plan import Plan, make_plan
from harness.pipeline.unread import unread
from harness.report.progress import Reporter
from harness.store import Run, Store

PROBE = (2, 128)  # windows x tokens on which the gate compares logits


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` done | failed, whether its result was `stored` before, its metrics and directory."""

    status: str
    stored: bool
    metrics: dict
    run: Run
    error: str | None = None


def execute(
    cfg,
    choices: Mapping[str, str | None],
    sweep: str | None = None,
    reporter: Reporter | None = None,
    command: str | None = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Run what `cfg` describes, or find it done. Raises ConfigError or DataError before anything is written when it cannot
    begin; an error after that is recorded in the run directory and returned. command: the line that runs it again; overrides:
    what it says of settings."""
    reporter = reporter or Reporter()
    plan = make_plan(settings(cfg), choices, overrides)
    store = Store(plan.settings["run_root"], reporter.say)
    run = store.run(plan.run_id)
    if _stored(plan, run):
        return _shown(plan, run)
    store.check()
    plan.check()
    from harness.pipeline.build import components

    parts = components(plan)
    with records.locked(run.path / "lock", wait=sweep is not None, say=reporter.say):
        if _stored(plan, run):  # by who held the lock
            return _shown(plan, run)
        return Job(plan, parts, store, run, reporter, command).outcome(sweep)


def _stored(plan: Plan, run: Run) -> bool:
    """Whether the store has this run's result, and the files it was told to write are still its own."""
    if plan.settings["force"] or run.status.get("status") != "done" or not run.metrics:
        return False
    exported, saved = run.metrics.get("export"), plan.settings["transform"].get("save")
    if exported is not None and about(Path(exported["path"])).get("run_id") != plan.run_id:
        return False  # another run has the name by now
    if not isinstance(saved, str):
        return True
    kept = records.intact(Path(saved), run.damaged) or {}
    return json.loads(kept.get("placement", "{}")).get("learned") == plan.learned_id


def _shown(plan: Plan, run: Run) -> Outcome:
    """A stored result, with what is to be said of settings that change none."""
    warnings = list(dict.fromkeys([*run.metrics["warnings"], *unread(plan)]))
    return Outcome("done", True, run.metrics | {"warnings": warnings}, run)


class Job:
    """One run while it is computed: metrics that grow stage by stage, and the parts that fill them.

    plan, parts (build.py), store, run, reporter, tracker; scratch: a folder that goes away at the end.
    """

    def __init__(
        self,
        plan: Plan,
        parts,
        store: Store,
        run: Run,
        reporter: Reporter,
        command: str | None = None,
    ):
        self.plan, self.parts, self.store, self.run, self.reporter = (
            plan,
            parts,
            store,
            run,
            reporter,
        )
        self.offloaded, self.scratch, self.placements = None, run.path / "scratch", []
        if plan.settings["force"]:
            run.forget()
        self.metrics = {
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
            "seconds": {},
            "peak_memory_mb": None,
            "layers": [],
            "warnings": parts.warnings,
            "notes": {},
        }
        if (
            plan.model.quantized
        ):  # the run quantizes nothing; what it measures was quantized by these
            self.metrics["holds"] = held(Path(plan.settings["model"]["path"]).expanduser())

    def outcome(self, sweep: str | None) -> Outcome:
        """Compute; whatever happens, the store knows how it ended."""
        _reset_peak_memory()
        new, refused = not self.run.status, False
        known = {"quant_id": self.plan.quant_id, "sweep": sweep, "command": self.metrics["command"]}
        self.run.start(self.plan.settings, known)
        self.tracker = self._start_tracker(sweep)
        error = None
        try:
            self._compute()
            self.metrics["status"] = "done"
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            self.metrics["status"] = "failed"
            self.run.set_status(error=error, traceback=traceback.format_exc())
            begun = bool(self.metrics["stages"])
            refused = isinstance(failure, ConfigError | DataError) and not begun
            if refused or not isinstance(failure, Exception):
                raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.metrics["peak_memory_mb"] = _peak_memory()
            self.run.end(self.metrics)
            self._mirror()
            if refused and new:  # nothing was computed, and nothing is left
                shutil.rmtree(self.run.path, ignore_errors=True)
        return Outcome(self.metrics["status"], False, self.metrics, self.run, error)

    def _compute(self) -> None:
        from harness.pipeline.devices import described, device

        with device(self.plan.settings["device"], self.store.root / "_shared" / "devices") as found:
            chosen, expected = self.plan.settings["device"], self.plan.device_kind
            if found.type != expected:  # the run's id says otherwise
                raise ConfigError(
                    f"device={chosen}: the machine has {expected}, torch computes on {found.type}; set "
                    f"device={found.type}."
                )
            self.run.set_environment(compute=described(found))
            self._compute_on(found)

    def _compute_on(self, device) -> None:
        import torch

        from harness.calibration.windows import refuse_unknown_ids, windows
        from harness.models.adapter import Adapter
        from harness.models.attention import attach
        from harness.models.source import assert_finite
        from harness.pipeline import export, measure, stages

        plan, parts = self.plan, self.parts
        with self.stage("load"):
            model, tokenizer = plan.model.load(device)
            self.tokenizer = tokenizer
            self.metrics["warnings"] += plan.model.warnings
            assert_finite(model)
            self.offloaded = plan.model.offloaded(model, self.scratch)
            adapter = Adapter(model, self.offloaded)
            chosen, read = (
                plan.evaluation,
                {c.name: measure.tokens(self, c, "evaluation") for c in plan.corpora},
            )
            self.texts = {
                name: windows(x, chosen.length, chosen.count, field="eval.perplexity")
                for name, x in read.items()
            }
            calibration = next(
                iter(self.texts.values())
            )  # of a run that calibrates nothing: for the gate to probe with
            used = dict(read)
            if plan.calibrates:
                ids = used["calibration"] = measure.tokens(
                    self, plan.calibration_corpus, "calibration"
                )
                own = plan.calibration.within(len(ids))
                calibration = windows(ids, own.length, own.count, own.order, plan.settings["seed"])
                self.metrics["calibration"] = dict(zip(("windows", "length"), calibration.shape))
                if own.count is None:
                    self.metrics["notes"]["calibration"] = "{} x {} tokens".format(
                        *calibration.shape
                    )
            for name, x in used.items():
                refuse_unknown_ids(name, x, model.get_input_embeddings().num_embeddings)
            self.metrics["marks"] = marks(
                plan.calibrated,
                any(t.learned for t in parts.transforms),
                plan.settings["transform"].get("load") is not None,
                {
                    name: (len(self.texts[name]), len(ids) // chosen.length)
                    for name, ids in read.items()
                },
                {
                    source: limit
                    for evaluation in plan.evaluations.values()
                    for source, limit in evaluation.limits().items()
                },
            )
        amp = plan.model.amp
        self.amp = None if amp is None else getattr(torch, amp)
        measure.baseline(self, adapter)

        probe = calibration[: PROBE[0], : PROBE[1]].to(device)
        changed = not plan.model.quantized and stages.transform(self, adapter, calibration, probe)
        inexact = not all(transform.exact for transform in parts.transforms)
        if inexact or (changed and not plan.quantizes):
            measure.evaluate(self, "transformed", adapter)
        if plan.quantizes:
            if parts.auto is not None:
                parts = self.parts = replace(
                    parts, scheme=stages.allocation(self, adapter, calibration)
                )
            if parts.scheme.any("weight") or parts.scheme.any("act"):
                # Several evaluations of one quantized model solve it once.
                with self.store.holding(self.store.shared("solving", plan.quant_id)):
                    stages.quantize(self, adapter, calibration)
            if parts.scheme.kv is not None:
                for heads in attach(adapter):
                    heads.format = parts.scheme.kv
            measure.evaluate(self, "quantized", adapter)
        if parts.exporter is not None:
            export.export(self, adapter)
        if self.metrics["bits_per_weight"] is None and not plan.model.quantized:
            self.metrics["bits_per_weight"] = float(torch.finfo(model.dtype).bits)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and note in the store that it runs."""
        self.run.set_status(stage=name)
        self.run.event("stage", stage=name)
        start = time.perf_counter()
        yield
        self.metrics["seconds"][name] = (
            self.metrics["seconds"].get(name, 0.0) + time.perf_counter() - start
        )
        self.run.save_metrics(self.metrics)

    def _start_tracker(self, sweep: str | None):
        from harness.tracking import Local, RunInfo, Several

        plan = self.plan
        tracker = Several([Local(), self.parts.tracker])
        tags = tuple(
            f"{group}:{option}"
            for group, option in plan.choices.items()
            if option and group != "tracking"
        )
        tracker.start(
            plan.settings,
            RunInfo(plan.run_id, plan.quant_id, self.run.path, group=sweep, tags=tags),
        )
        return tracker

    def _mirror(self) -> None:
        """Send the final numbers to the trackers."""
        values = summary(stored(self.metrics))
        values |= {k: self.metrics[k] for k in ("bits_per_weight", "peak_memory_mb", "status")}
        values |= {f"seconds/{stage}": s for stage, s in self.metrics["seconds"].items()}
        if self.metrics["layers"]:
            self.tracker.table("layers", self.metrics["layers"])
        for name, evaluation in self.plan.evaluations.items():
            figures = rows(name, self.metrics["stages"]) if evaluation.tabled else []
            if figures:
                self.tracker.table(name, figures)
        self.tracker.finish(values, self.metrics["status"])


def _reset_peak_memory() -> None:
    """Forget what earlier jobs of this process needed, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory() -> float:
    """Most resident memory since the reset, in MB (since the start of the process where there is no reset)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
