"""The stage between solving and measuring: a tuner learns, or what it learned before is found.

What it made lies beside the solved blocks, under a key of its settings: another tuner finds the
same blocks. `NNNN.KEY` is what it made of block N, one more file has what stands outside of them,
and is written last: where it is, all are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.calibration.subject import StreamedModel
from harness.config.errors import DataError
from harness.formats import QTensor
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.pipeline.solving import write_encodings
from harness.pipeline.state import LoadedJob
from harness.quantize.weights import solved
from harness.store import Run
from harness.transforms.learn import Teacher
from harness.tune import Student, Tuned, Tuner

FLOAT = "float."  # before the names of tensors that are no part of a QTensor


def keep_solved(job: LoadedJob, adapter: Adapter) -> None:
    """To be called before solving: has the linears keep what is solved, for a tuner that asks for
    it."""
    if job.parts.tuner is not None and job.parts.tuner.needs_solved:
        for linear in _linears(adapter).values():
            linear.keeps = True


def tune(job: LoadedJob, adapter: Adapter, text: Tensor, tuner: Tuner) -> None:
    """Tune the solved model as it is served, or take what was tuned before.

    text: token ids [N, L]. Raises FloatingPointError where the loss is not finite.
    """
    run = job.run
    plan = job.plan
    before = _released(adapter)
    parts = [f"{index:04d}.{plan.tune_id}" for index in range(len(adapter.blocks) + 1)]
    shared = job.store.shared("tuning", f"{plan.quant_id}-{plan.tune_id}")
    with job.stage("tune"), job.store.holding(shared):
        if not plan.settings["force"]:
            job.store.adopt_blocks(run, plan.quant_id)
        source = "store"
        if any(run.load_part(part) is None for part in parts):
            source = "tuned"
            progress = Progress(run, f"tune.{plan.tune_id}")
            student = _student(job, adapter, text, before, progress)
            _save(run, adapter, parts, tuner.tune(student))
            del student  # and the untouched model with it
            if job.ranks.first:
                progress.path.unlink(missing_ok=True)
        run.event("tune", source=source, key=plan.tune_id)
        run.tuned = plan.tune_id
        notes = _install(job, adapter, parts)
        write_encodings(job, adapter)
    job.metrics["notes"] |= notes
    if notes.get("tune_best_step") == 0:
        job.metrics["warnings"].append(
            f"tune={plan.settings['tune']['name']} changed nothing: no step lowered the held-out "
            "loss"
        )


@dataclass(frozen=True)
class Progress:
    """How far a tuner is, beside the solved blocks (tune.base.Kept)."""

    run: Run
    name: str

    @property
    def path(self) -> Path:
        return self.run.part(self.name)

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        return self.run.load_part(self.name)

    def save(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        self.run.save_part(self.name, dict(tensors), dict(values))


def _linears(adapter: Adapter) -> dict[str, QuantLinear]:
    """{absolute name: it} of all linears of the blocks."""
    return {
        adapter.name(index, name): linear
        for index in range(len(adapter.blocks))
        for site in adapter.sites(index)
        for name, linear in adapter.linears(index, site).items()
    }


def _released(adapter: Adapter) -> dict[str, Tensor]:
    """{absolute name: the weight that was solved} of those that were kept, which they are no
    longer."""
    found = {}
    for name, linear in _linears(adapter).items():
        linear.keeps = False
        if linear.solved is not None:
            found[name] = linear.solved
            linear.solved = None
    return found


def _student(
    job: LoadedJob,
    adapter: Adapter,
    text: Tensor,
    before: dict[str, Tensor],
    progress: Progress,
) -> Student:
    """The solved model with its teacher, which is loaded again: transforms and solvers work in
    place."""
    qtensors: dict[str, QTensor] = {}
    for index in range(len(adapter.blocks)):
        qtensors |= solved(adapter, job.parts.scheme, job.run, index)
    model, _ = job.plan.model.load(adapter.device)
    untouched = Adapter(model, structure=adapter.structure)
    texts = len(job.plan.calibration_corpora)
    return Student(
        StreamedModel(
            adapter,
            text,
            job.reporter.stage,
            log=job.tracker.log,
            texts=texts,
            ranks=job.ranks,
        ),
        qtensors,
        before,
        Teacher(StreamedModel(untouched, text)),
        job.amp,
        progress,
    )


def _save(run: Run, adapter: Adapter, parts: Sequence[str], tuned: Tuned) -> None:
    """Write what was learned, block by block, and what is outside of them last."""
    blocks = f"{adapter.structure.blocks}."
    for index, part in enumerate(parts):
        start = f"{blocks}{index}."
        tensors: dict[str, Tensor] = {}
        for name, q in tuned.qtensors.items():
            if name.startswith(start):
                short = name.removeprefix(start)
                tensors |= {f"{short}.{key}": value for key, value in q.state().items()}
        last = part == parts[-1]
        for name, tensor in tuned.tensors.items():
            if name.startswith(start) or (last and not name.startswith(blocks)):
                tensors[FLOAT + name] = tensor
        run.save_part(part, tensors, {"notes": tuned.notes if last else {}})


@torch.no_grad()
def _install(job: LoadedJob, adapter: Adapter, parts: Sequence[str]) -> dict:
    """Put what was learned into the model; returns the notes."""
    notes: dict = {}
    for index, part in enumerate(parts):
        record = job.run.load_part(part)
        if record is None:
            raise DataError(
                f"{job.run.part(part)} was damaged while this run went on; the same command tunes "
                "again."
            )
        tensors, report = record
        notes |= report["notes"]
        for key, value in tensors.items():
            if key.startswith(FLOAT):
                owner, _, leaf = key.removeprefix(FLOAT).rpartition(".")
                getattr(adapter.model.get_submodule(owner), leaf).copy_(value)
        if index < len(adapter.blocks):
            for name, q in solved(adapter, job.parts.scheme, job.run, index).items():
                adapter.model.get_submodule(name).load(q.dequantize())
    return notes
