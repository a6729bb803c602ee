"""What is measured of a model at each stage: perplexity, divergence from the untouched model, zero-shot accuracy. Each function
takes the job (pipeline.Job): its plan, store, run, reporter, metrics.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from harness import store as records
from harness.calibration.corpus import Corpus
from harness.calibration.windows import tokenize
from harness.config.build import fingerprint
from harness.evaluation.divergence import Reference
from harness.evaluation.perplexity import perplexity, steps, window_losses
from harness.models.adapter import Adapter


def tokens(job, corpus: Corpus, part: str) -> Tensor:
    """Token ids [N] of a text, tokenized once for all runs of the same model."""
    key = fingerprint(job.plan.model.fingerprint(), corpus.fingerprint(part))
    path = job.store.shared("tokens", key).with_suffix(".safetensors")
    with job.store.holding(path):
        record = records.load_tensors(path, job.run.damaged)
        if record is not None:
            return record[0]["tokens"]
        ids = tokenize(job.tokenizer, corpus.text(part))
        records.save_tensors(path, {"tokens": ids})
        return ids


def baseline(job, adapter: Adapter) -> None:
    """The untouched model's figures, measured once for all runs of the same model and texts."""
    path = job.store.shared("baselines", job.plan.baseline_id)
    job.reference = Reference(adapter)
    with job.store.holding(path):
        known = None if job.plan.settings["force"] else _known(job, path)
        job.run.event("baseline", source="computed" if known is None else "store")
        if known is None:
            evaluate(job, "baseline", adapter)
            job.reference.save(path.with_suffix(".safetensors"))
            known = {
                "stage": job.metrics["stages"]["baseline"],
                "seconds": job.metrics["seconds"]["baseline"],
            }
            records.write_record(path, known)
        else:
            job.reporter.say("baseline: from the store")
    job.metrics["stages"]["baseline"], job.metrics["seconds"]["baseline"] = (
        known["stage"],
        known["seconds"],
    )


def _known(job, path: Path) -> dict | None:
    """The stored baseline, where its figures, hidden states and answers are all whole."""
    known = records.read_record(path, job.run.damaged)
    hidden = records.intact(path.with_suffix(".safetensors"), job.run.damaged)
    if known is None or hidden is None:
        return None
    for task, digest in known["stage"].get("samples", {}).items():
        answers = path.with_suffix("") / f"{task}.json"
        if records.checked(answers, digest, job.run.damaged) is None:
            return None
    return known


def evaluate(job, stage: str, adapter: Adapter) -> None:
    """All figures of the model as it is now, into job.metrics. Raises FloatingPointError for a perplexity that is none."""
    shared = job.store.shared("baselines", job.plan.baseline_id)
    result = {"ppl": {}, "losses": {}, "tokens": 0} | (
        {} if stage == "baseline" else {"divergence": {}}
    )
    streaming = job.plan.settings["eval"]["streaming"] or job.offloaded is not None
    total = sum(steps(adapter, text, streaming) for text in job.texts.values())
    with job.stage(stage), job.reporter.stage(f"evaluate {stage}", total) as advance:
        for corpus, text in job.texts.items():
            length = text.shape[1]
            if stage == "baseline":
                watch = job.reference.recorder(corpus)
            else:
                watch = job.reference.compare(corpus, shared.with_suffix(".safetensors"), length)
            losses = window_losses(adapter, text, job.amp, advance, streaming, watch)
            result["ppl"][corpus] = perplexity(losses, length)
            result["losses"][corpus] = (losses / (length - 1)).tolist()
            result["tokens"] += text.numel()
            if stage != "baseline":
                result["divergence"][corpus] = watch.figures
        if job.plan.zeroshot is not None:
            folder = (
                shared.with_suffix("") if stage == "baseline" else job.run.path / "samples" / stage
            )
            result["zeroshot"], result["samples"] = _zeroshot(job, stage, adapter, folder)
    job.metrics["stages"][stage] = result
    lost = [corpus for corpus, x in result["ppl"].items() if not math.isfinite(x)]
    if lost:
        raise FloatingPointError(
            f"the {stage} model's perplexity on {', '.join(lost)} is not finite"
        )


def _zeroshot(job, stage: str, adapter: Adapter, folder: Path) -> tuple[dict, dict]:
    """(accuracies, {task: digest of its file}); what every document got goes to `folder`."""
    from harness.evaluation.zeroshot import zeroshot

    with job.reporter.stage(f"zero-shot {stage}", len(job.plan.zeroshot.tasks)) as advance:
        figures, samples = zeroshot(
            adapter.model, job.tokenizer, job.plan.zeroshot, job.amp, advance
        )
    digests = {
        task: records.write_checked(folder / f"{task}.json", documents)
        for task, documents in samples.items()
    }
    return figures, digests
