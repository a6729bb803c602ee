"""The order of a run's stages, and the record of them; stages.py says what each does to the model.

    plan -> stored already? show it -> build and check -> load -> baseline -> transform, fold, gate
         -> blocks: statistics, solve, swap, save -> evaluate -> metrics, trackers, table

A run that was killed goes on from its last finished block; a finished one is shown and not computed again.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness import store as records
from harness.config import settings
from harness.errors import ConfigError, DataError
from harness.plan import Plan, make_plan
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


def execute(cfg, choices: Mapping[str, str | None], sweep: str | None = None, reporter: Reporter | None = None) -> Outcome:
    """Run what `cfg` describes, or find it done. Raises ConfigError or DataError before anything is written when it cannot
    begin; an error after that is recorded in the run directory and returned."""
    reporter = reporter or Reporter()
    plan = make_plan(settings(cfg), choices)
    store = Store(plan.settings["run_root"])
    run = store.run(plan.run_id)
    kept = plan.settings["transform"].get("save")
    unsaved = isinstance(kept, str) and not Path(kept).is_file()
    if run.status.get("status") == "done" and run.metrics and not plan.settings["force"] and not unsaved:
        return Outcome("done", True, run.metrics, run)
    store.check()
    plan.check()
    from harness.components import components

    parts = components(plan)
    with records.locked(run.path / "lock"):
        return Job(plan, parts, store, run, reporter).outcome(sweep)


class Job:
    """One run while it is computed: metrics that grow stage by stage, and the parts that fill them.

    plan, parts (components.py), store, run, reporter, tracker; scratch: a folder that goes away at the end.
    """

    def __init__(self, plan: Plan, parts, store: Store, run: Run, reporter: Reporter):
        self.plan, self.parts, self.store, self.run, self.reporter = plan, parts, store, run, reporter
        self.shelf, self.scratch = None, run.path / "scratch"
        if plan.settings["force"]:
            run.forget()
        self.metrics = {
            "run_id": plan.run_id, "quant_id": plan.quant_id, "status": "running", "choices": plan.choices,
            "stages": {}, "bits_per_weight": None, "seconds": {}, "peak_memory_mb": None, "layers": [],
            "warnings": parts.warnings, "notes": {},
        }

    def outcome(self, sweep: str | None) -> Outcome:
        """Compute; whatever happens, the store knows how it ended."""
        _reset_peak_memory()
        self.run.start(self.plan.settings, {"quant_id": self.plan.quant_id})
        self.tracker = self._start_tracker(sweep)
        error = None
        try:
            self._compute()
            self.metrics["status"] = "done"
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            self.metrics["status"] = "failed"
            self.run.set_status(error=error, traceback=traceback.format_exc())
            if not isinstance(failure, Exception) or isinstance(failure, ConfigError | DataError):
                raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.metrics["peak_memory_mb"] = _peak_memory()
            self.run.save_metrics(self.metrics)
            self.run.set_status(status=self.metrics["status"])
            self.run.event("end", status=self.metrics["status"])
            self._mirror()
        return Outcome(self.metrics["status"], False, self.metrics, self.run, error)

    def _compute(self) -> None:
        import torch

        from harness import stages
        from harness.calibration.windows import tokenize, windows
        from harness.models.attention import attach
        from harness.models.families import Adapter
        from harness.models.load import assert_finite

        plan, parts = self.plan, self.parts
        chosen = plan.settings["device"]
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen)
        with self.stage("load"):
            model, tokenizer = plan.model.load(device)
            self.tokenizer = tokenizer
            assert_finite(model)
            self.shelf = plan.model.shelf(model, self.scratch)
            adapter = Adapter(model, self.shelf)
            chosen = plan.calibration
            text = plan.calibration_corpus.text("calibration")
            calibration = windows(tokenize(tokenizer, text), chosen.length, chosen.count, chosen.order, plan.settings["seed"])
            chosen = plan.evaluation
            self.texts = {
                c.name: windows(tokenize(tokenizer, c.text("evaluation")), chosen.length, chosen.count, field="eval.perplexity")
                for c in plan.corpora
            }
        amp = plan.settings["model"]["amp"]
        self.amp = None if amp is None else getattr(torch, amp)
        self._baseline(adapter)

        probe = calibration[: PROBE[0], : PROBE[1]].to(device)
        changed = stages.transform(self, adapter, calibration, probe)
        inexact = not all(transform.exact for transform in parts.transforms)
        if inexact or (changed and not plan.quantizes):
            self._evaluate("transformed", adapter)
        if plan.quantizes:
            if parts.auto is not None:
                parts = self.parts = replace(parts, scheme=stages.allocation(self, adapter, calibration))
            if parts.scheme.any("weight") or parts.scheme.any("act"):
                stages.quantize(self, adapter, calibration)
            if parts.scheme.kv is not None:
                for heads in attach(adapter):
                    heads.format = parts.scheme.kv
            self._evaluate("quantized", adapter)
        if self.metrics["bits_per_weight"] is None:
            self.metrics["bits_per_weight"] = float(torch.finfo(model.dtype).bits)

    def _baseline(self, adapter) -> None:
        """The untouched model's perplexity, computed once for all runs of the same model and texts."""
        path = self.store.shared("baselines", self.plan.baseline_id)
        with records.locked(path.with_suffix(".lock"), wait=True):
            known = records.read_json(path)
            if known is None or self.plan.settings["force"]:
                self._evaluate("baseline", adapter)
                known = {"stage": self.metrics["stages"]["baseline"], "seconds": self.metrics["seconds"]["baseline"]}
                records.write_json(path, known)
            else:
                self.reporter.say("baseline: from the store")
        self.metrics["stages"]["baseline"], self.metrics["seconds"]["baseline"] = known["stage"], known["seconds"]

    def _evaluate(self, stage: str, adapter) -> None:
        from harness.evaluation.perplexity import perplexity, steps, window_losses

        result = {"ppl": {}, "tokens": 0}
        streaming = self.plan.settings["eval"]["streaming"] or self.shelf is not None
        total = sum(steps(adapter, text, streaming) for text in self.texts.values())
        with self.stage(stage), self.reporter.stage(f"evaluate {stage}", total) as advance:
            for corpus, text in self.texts.items():
                losses = window_losses(adapter, text, self.amp, advance, streaming)
                result["ppl"][corpus] = perplexity(losses, text.shape[1])
                result["tokens"] += text.numel()
            if self.plan.zeroshot is not None:
                from harness.evaluation.zeroshot import zeroshot

                result["zeroshot"], samples = zeroshot(adapter.model, self.tokenizer, self.plan.zeroshot, self.amp)
                folder = self.run.path / "samples" / stage
                if stage == "baseline":  # other runs find it there
                    folder = self.store.shared("baselines", self.plan.baseline_id).with_suffix("")
                for task, documents in samples.items():
                    records.write_json(folder / f"{task}.json", documents)
        self.metrics["stages"][stage] = result
        lost = [corpus for corpus, x in result["ppl"].items() if not math.isfinite(x)]
        if lost:
            raise FloatingPointError(f"the {stage} model's perplexity on {', '.join(lost)} is not finite")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and note in the store that it runs."""
        self.run.set_status(stage=name)
        self.run.event("stage", stage=name)
        start = time.perf_counter()
        yield
        self.metrics["seconds"][name] = self.metrics["seconds"].get(name, 0.0) + time.perf_counter() - start
        self.run.save_metrics(self.metrics)

    def _start_tracker(self, sweep: str | None):
        from harness.tracking import RunInfo

        plan, tracker = self.plan, self.parts.tracker
        tags = tuple(f"{group}:{option}" for group, option in plan.choices.items() if option and group != "tracking")
        tracker.start(plan.settings, RunInfo(plan.run_id, plan.quant_id, self.run.path, group=sweep, tags=tags))
        return tracker

    def _mirror(self) -> None:
        """Send the final numbers to the trackers."""
        summary = {f"ppl/{stage}/{corpus}": x for stage, s in self.metrics["stages"].items() for corpus, x in s["ppl"].items()}
        for stage, result in self.metrics["stages"].items():
            for task, figures in result.get("zeroshot", {}).items():
                summary |= {f"zeroshot/{stage}/{task}/{metric}": value for metric, value in figures.items()}
        summary |= {k: self.metrics[k] for k in ("bits_per_weight", "peak_memory_mb", "status")}
        summary |= {f"seconds/{stage}": s for stage, s in self.metrics["seconds"].items()}
        if self.metrics["layers"]:
            self.tracker.table("layers", self.metrics["layers"])
        self.tracker.finish(summary, self.metrics["status"])


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
