"""The order of a run's stages; the only file that knows every part.

    plan -> stored already? show it -> build and check -> load -> baseline -> transform, fold, gate
         -> blocks: statistics, solve, swap, save -> evaluate -> metrics, trackers, table

A run that was killed goes on from its last finished block; a finished one is shown and not computed again.
"""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from harness import store as records
from harness.config import build, settings
from harness.errors import ConfigError, DataError
from harness.plan import Components, Plan, components, make_plan
from harness.report.progress import Reporter
from harness.store import Run, Store

GATE_RELATIVE, GATE_MEAN = 1e-4, 1e-4  # float32 logits: max |delta| against max |logit|, and mean |delta|
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
    if run.status.get("status") == "done" and run.metrics and not plan.settings["force"]:
        return Outcome("done", True, run.metrics, run)
    store.check()
    plan.check()
    parts = components(plan)
    tracker = build(plan.settings["tracking"], "tracking")
    with records.locked(run.path / "lock"):
        return _Execution(plan, parts, store, run, reporter).outcome(tracker, sweep)


class _Execution:
    """One run while it is computed: metrics that grow stage by stage, and the parts that fill them."""

    def __init__(self, plan: Plan, parts: Components, store: Store, run: Run, reporter: Reporter):
        self.plan, self.parts, self.store, self.run, self.reporter = plan, parts, store, run, reporter
        if plan.settings["force"]:
            run.forget()
        self.metrics = {
            "run_id": plan.run_id, "quant_id": plan.quant_id, "status": "running", "choices": plan.choices,
            "stages": {}, "bits_per_weight": None, "seconds": {}, "peak_memory_mb": None, "layers": [],
            "warnings": parts.warnings, "notes": {},
        }

    def outcome(self, tracker, sweep: str | None) -> Outcome:
        """Compute; whatever happens, the store knows how it ended."""
        self.run.start(self.plan.settings, {"quant_id": self.plan.quant_id})
        self.tracker = self._started(tracker, sweep)
        error = None
        try:
            self._compute()
            self.metrics["status"] = "done"
        except (Exception, KeyboardInterrupt) as failure:
            error = f"{type(failure).__name__}: {failure}"
            self.metrics["status"] = "failed"
            self.run.set_status(error=error, traceback=traceback.format_exc())
            if isinstance(failure, KeyboardInterrupt | ConfigError | DataError):
                raise
        finally:
            self.metrics["peak_memory_mb"] = _peak_memory()
            self.run.save_metrics(self.metrics)
            self.run.set_status(status=self.metrics["status"])
            self.run.event("end", status=self.metrics["status"])
            self._mirror()
        return Outcome(self.metrics["status"], False, self.metrics, self.run, error)

    def _compute(self) -> None:
        import torch

        from harness import blockwise
        from harness.calibration.windows import tokenize, windows
        from harness.models.families import Adapter
        from harness.models.load import assert_finite

        plan, parts = self.plan, self.parts
        device = _device(plan.settings["device"])
        with self._stage("load"):
            model, tokenizer = plan.model.load(device)
            assert_finite(model)
            adapter = Adapter(model)
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

        quantizing = parts.scheme.weight is not None or parts.scheme.act is not None
        with self._stage("transformed"), torch.no_grad():
            placement = parts.transform.fit(parts.context)
            self.metrics["notes"] |= dict(placement.notes)
            probe = calibration[: PROBE[0], : PROBE[1]].to(device)
            before = model(probe, use_cache=False).logits
            blockwise.place(adapter, placement)
            if parts.transform.exact:
                self._gate(before, model(probe, use_cache=False).logits)
            del before
        if placement.sites and not quantizing:
            self._evaluate("transformed", adapter)
        if quantizing:
            self._quantize(blockwise, adapter, calibration)
            self._evaluate("quantized", adapter)
        else:
            self.metrics["bits_per_weight"] = float(torch.finfo(model.dtype).bits)

    def _quantize(self, blockwise, adapter, calibration) -> None:
        plan, parts = self.plan, self.parts
        found = self.store.adopt_blocks(self.run, plan.quant_id)
        if found:
            self.reporter.say(f"quantize: {found} of {len(adapter.blocks)} blocks are in the store")
        with self._stage("solve"), self.reporter.stage("quantize", len(adapter.blocks)) as advance:

            def done(index: int, layers: list[dict]) -> None:
                self.metrics["layers"] += layers
                errors = [layer["rel_error"] for layer in layers]
                mean = sum(errors) / len(errors)
                self.tracker.log({"block/rel_error": mean, "block/worst_rel_error": max(errors)}, step=index)
                advance(f"relative output error {mean:.4f}")

            blockwise.quantize(adapter, parts.scheme, parts.solver, calibration, self.run, done)
        layers = self.metrics["layers"]
        fallbacks = [layer["name"] for layer in layers if layer.get("fallback")]
        if fallbacks:
            self.metrics["warnings"].append(f"{len(fallbacks)} linears fell back to RTN (singular H): {', '.join(fallbacks)}")
        damped = [x["name"] for x in layers if x.get("damp") and x["damp"] > parts.solver.damp]
        if damped:
            self.metrics["warnings"].append(f"{len(damped)} linears needed more damping than solver.damp: {', '.join(damped)}")
        weights = sum(layer.get("weights", 0) for layer in layers)
        bits = sum(layer.get("bits", 0) for layer in layers) / weights if weights else None
        self.metrics["bits_per_weight"] = bits

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
        from harness.evaluation.perplexity import perplexity, window_losses

        result = {"ppl": {}, "tokens": 0}
        total = sum(len(text) for text in self.texts.values())
        with self._stage(stage), self.reporter.stage(f"evaluate {stage}", total) as advance:
            for corpus, text in self.texts.items():
                losses = window_losses(adapter, text, self.amp, advance)
                result["ppl"][corpus] = perplexity(losses, text.shape[1])
                result["tokens"] += text.numel()
        self.metrics["stages"][stage] = result

    def _gate(self, before, after) -> None:
        """Raises RuntimeError when an exact transform changed the function of the model beyond rounding."""
        import torch

        delta = (after.float() - before.float()).abs()
        scale = torch.finfo(before.dtype).eps / torch.finfo(torch.float32).eps
        limit = GATE_RELATIVE * scale * float(before.abs().max())
        worst, mean = float(delta.max()), float(delta.mean())
        self.metrics["notes"]["gate"] = {"max": worst, "mean": mean}
        if not (worst <= limit and mean <= GATE_MEAN * scale):
            raise RuntimeError(
                f"transform={self.plan.choices.get('transform')} changed the model: logits moved by up to {worst:.3g} "
                f"(mean {mean:.3g}), allowed {limit:.3g} (mean {GATE_MEAN * scale:.3g})"
            )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.run.set_status(stage=name)
        self.run.event("stage", stage=name)
        start = time.perf_counter()
        yield
        self.metrics["seconds"][name] = self.metrics["seconds"].get(name, 0.0) + time.perf_counter() - start
        self.run.save_metrics(self.metrics)

    def _started(self, tracker, sweep: str | None):
        from harness.tracking import RunInfo

        plan = self.plan
        tags = tuple(f"{group}:{option}" for group, option in plan.choices.items() if option and group != "tracking")
        tracker.start(plan.settings, RunInfo(plan.run_id, plan.quant_id, self.run.path, group=sweep, tags=tags))
        return tracker

    def _mirror(self) -> None:
        """Send the final numbers to the trackers."""
        summary = {f"ppl/{stage}/{corpus}": x for stage, s in self.metrics["stages"].items() for corpus, x in s["ppl"].items()}
        summary |= {k: self.metrics[k] for k in ("bits_per_weight", "peak_memory_mb", "status")}
        summary |= {f"seconds/{stage}": s for stage, s in self.metrics["seconds"].items()}
        if self.metrics["layers"]:
            self.tracker.table("layers", self.metrics["layers"])
        self.tracker.finish(summary, self.metrics["status"])


def _device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: this machine has no CUDA device; use device=cpu or auto.")
    return torch.device(name)


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
