"""What is measured of a model at each stage, by the evaluations of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from harness import store as records
from harness.calibration.corpus import Corpus
from harness.calibration.windows import tokenize
from harness.config.build import fingerprint
from harness.config.errors import DataError
from harness.evaluation.base import Evaluation, Figures, Subject, Watch
from harness.evaluation.perplexity import steps, window_losses
from harness.evaluation.records import plain
from harness.models.adapter import Adapter
from harness.parallel import ALONE
from harness.pipeline.state import LoadedJob


def tokens(job: LoadedJob, corpus: Corpus, part: str) -> Tensor:
    """Token ids [N] of a text, tokenized once for all runs of the same model."""
    key = fingerprint(job.plan.model.fingerprint(), corpus.fingerprint(part))
    path = job.store.shared("tokens", key).with_suffix(".safetensors")
    with job.store.holding(path):
        return job.ranks.lead(lambda: _tokens(job, corpus.text(part), path))


def _tokens(job: LoadedJob, text: str | Sequence[str], path: Path) -> Tensor:
    """Those that lie at `path`, or are to lie there."""
    record = records.load_tensors(path, job.run.damaged)
    if record is not None:
        return record[0]["tokens"]
    ids = tokenize(job.tokenizer, text)
    records.save_tensors(path, {"tokens": ids})
    return ids


def baseline(job: LoadedJob, adapter: Adapter) -> None:
    """The untouched model's figures, measured once for all runs of the same model and texts."""
    path = job.store.shared("baselines", job.plan.baseline_id)
    with job.store.holding(path):
        known = None
        if not job.plan.settings["force"]:
            known = job.ranks.lead(lambda: _known(job, path))
        job.run.event("baseline", source="computed" if known is None else "store")
        if known is None:
            evaluate(job, "baseline", adapter)
            job.reference.save(path.with_suffix(".safetensors"), job.ranks)
            known = {
                "stage": job.metrics["stages"]["baseline"],
                "seconds": job.metrics["seconds"]["baseline"],
            }
            if job.ranks.first:
                records.write_record(path, known)
        else:
            job.reporter.say("baseline: from the store")
    job.metrics["stages"]["baseline"] = known["stage"]
    job.metrics["seconds"]["baseline"] = known["seconds"]
    job.metrics |= plain(job.plan.evaluations, job.metrics["stages"])


def _known(job: LoadedJob, path: Path) -> dict | None:
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


def evaluate(job: LoadedJob, stage: str, adapter: Adapter) -> Subject:
    """All figures of the model as it is now, into job.metrics; returns what was measured. Raises
    FloatingPointError where an evaluation says that the model is lost."""
    shared = job.store.shared("baselines", job.plan.baseline_id)
    untouched = stage == "baseline"
    subject = Subject(
        stage,
        adapter,
        job.tokenizer,
        job.amp,
        job.texts,
        job.reference,
        hidden=shared.with_suffix(".safetensors"),
        folder=shared.with_suffix("") if untouched else job.run.path / "samples" / stage,
        progress=job.reporter.stage,
        ranks=job.ranks,
    )
    streaming = job.plan.settings["eval"]["streaming"] or job.offloaded is not None
    own = map(job.ranks.share, job.texts.values())
    total = sum(steps(adapter, text, streaming) for text in own)
    result: dict[str, object] = {}
    measured: dict[str, Figures] = {}
    with job.stage(stage), job.reporter.stage(f"evaluate {stage}", total) as advance:
        watches = _pass(job.plan.evaluations, subject, streaming, advance)
        for name, evaluation in job.plan.evaluations.items():
            own = replace(subject, watches=watches[name], details={})
            measured[name] = evaluation.measure(own)
            if measured[name]:
                result[name] = measured[name]
            result |= own.details
    # Kept before anything is refused: a lost model's figures say how it was lost.
    job.metrics["stages"][stage] = result
    job.metrics |= plain(job.plan.evaluations, job.metrics["stages"])
    for name, evaluation in job.plan.evaluations.items():
        evaluation.verify(stage, measured[name])
    return subject


def exported(job: LoadedJob, subject: Subject, folder: Path) -> None:
    """What evaluations say of the run's checkpoint, beside their figures of the stage that it
    holds.

    Raises DataError where one of them failed, when the others are done: the run is no stored
    result then, and the same command comes here again from its solved blocks.
    """
    stage = job.metrics["stages"][subject.stage]
    failures = []
    for name, evaluation in job.plan.evaluations.items():
        try:
            figures = evaluation.exported(replace(subject, details={}), folder)
        except DataError as error:
            failures.append(f"eval={name}: {error}")
            continue
        if figures:
            stage[name] = figures
    job.metrics |= plain(job.plan.evaluations, job.metrics["stages"])
    if failures:
        raise DataError(
            f"{'; '.join(failures)}; all else is stored, and the same command tries this again."
        )


def _pass(
    evaluations: Mapping[str, Evaluation],
    subject: Subject,
    streaming: bool,
    advance: Callable[[], None],
) -> dict[str, dict[str, Watch]]:
    """Fill subject.losses by one pass over each text; {evaluation: {corpus: who looked on}}.

    Ranks pass their share of it each, unless someone who looks on needs to see all.
    """
    watches: dict[str, dict[str, Watch]] = {name: {} for name in evaluations}
    for corpus, text in subject.texts.items():
        for name, evaluation in evaluations.items():
            watch = evaluation.watch(subject, corpus)
            if watch is not None:
                watches[name][corpus] = watch
        present = {name: own[corpus] for name, own in watches.items() if corpus in own}
        shared = all(evaluations[name].adds_up for name in present)
        if not shared:
            windows = subject.ranks.share(range(len(text)))
            for name in filter(lambda name: evaluations[name].adds_up, present):
                present[name] = _only(present[name], windows)
        subject.losses[corpus] = window_losses(
            subject.adapter,
            text,
            subject.amp,
            advance,
            streaming,
            _together(list(present.values())),
            subject.ranks if shared else ALONE,
        )
    return watches


def _only(watched: Watch, windows: Sequence[int]) -> Watch:
    """One that sees these windows alone."""

    def watch(window: int, position: int, states: Tensor, logits: Tensor) -> None:
        if window in windows:
            watched(window, position, states, logits)

    return watch


def _together(watches: Sequence[Watch]) -> Watch:
    """One for all: a pass makes its logits once."""

    def watch(window: int, position: int, states: Tensor, logits: Tensor) -> None:
        for one in watches:
            one(window, position, states, logits)

    return watch
