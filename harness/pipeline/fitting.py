"""The stage between the baseline and solving: transforms are fitted, or found as they were learned
before, and placed, and exact ones are held to the gate.

What one learns lies in the store, under a key of all that it saw: a sweep over solvers learns once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness.calibration.outliers import outliers, profiles
from harness.calibration.subject import StreamedModel
from harness.evaluation.gate import exact_logits, gate, stream_gate, text_gate
from harness.models import merge
from harness.models.adapter import Adapter
from harness.pipeline.combinations import placement_facts
from harness.pipeline.state import LoadedJob
from harness.transforms import Placement, Transform, file
from harness.transforms.identity import Identity


def transform(job: LoadedJob, adapter: Adapter, calibration: Tensor, probe: Tensor) -> bool:
    """Fit (or find) and place every transform, and hold exact ones to the gate.

    calibration, probe: token ids [N, L]. Returns whether anything changed. Raises RuntimeError
    where the gate finds another function than before.
    """
    transforms = job.parts.transforms
    notes = job.metrics["notes"]
    with job.stage("fit"):
        if job.plan.calibrates:
            notes["stream"] = stream_gate(adapter, calibration[:1])
        before = _logits(adapter, probe)
        if adapter.structure.towers:
            text_gate(adapter, probe, before)
        exact = None
        # In 16 bits the gate needs to know what the model's own rounding does to its logits.
        halved = adapter.model.dtype not in (torch.float32, torch.float64)
        # Experts as linears of their own add up in another order.
        if halved and (any(map(_changes, transforms)) or adapter.structure.mixes):
            exact = exact_logits(adapter, probe)
        merge.swap(adapter)
        untouched = {}
        if job.plan.calibrates:
            untouched = profiles(adapter, calibration, job.ranks)
        # Only a rotated residual stream needs the norms' weights out of its way.
        gains = None
        if any(transform.residual for transform in transforms):
            gains = merge.fuse_norms(adapter)
        # What a transform learns are its own matrices.
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)
        subject = StreamedModel(
            adapter,
            calibration,
            job.reporter.stage,
            gains,
            job.tracker.log,
            texts=len(job.plan.calibration_corpora),
            ranks=job.ranks,
        )
        changed = _place(job, adapter, subject)
        if all(transform.exact for transform in transforms):
            after = _logits(adapter, probe)
            name = job.plan.settings["transform"]["name"]
            notes["gate"] = gate(before, after, name, exact, adapter.structure.mixes)
        if job.plan.calibrates:
            # Placing nothing leaves every profile as it is.
            placed = profiles(adapter, calibration, job.ranks) if changed else untouched
            changes = outliers(untouched, placed)
            job.run.save("outliers.json", changes)
            job.tracker.table("outliers", [_flat(row) for row in changes["rows"]])
    return changed


def _place(job: LoadedJob, adapter: Adapter, subject: StreamedModel) -> bool:
    """Fit and place one transform after the other: each is fitted to what those before it made.

    Returns whether any placed anything.
    """
    for part, transform in enumerate(job.parts.transforms):
        placement = fitted(job, part, transform, subject)
        if placement.empty and not isinstance(transform, Identity):
            job.metrics["warnings"].append(
                f"transform={transform.name} placed nothing, so this is transform=identity"
            )
        job.metrics["notes"] |= dict(placement.notes)
        merge.place(adapter, placement)
        # Clips of weights belong to their format, which format=auto chooses only now.
        clipped = ("act",) if job.parts.auto is not None else ("act", "weight")
        scheme = job.parts.scheme.clipped(placement.clips, clipped)
        job.parts = replace(job.parts, scheme=scheme)
        job.placements.append(placement)
    return not all(placement.empty for placement in job.placements)


def fitted(job: LoadedJob, part: int, transform: Transform, subject: StreamedModel) -> Placement:
    """What a transform fits, the `part`-th of the run's.

    What it has learned before is taken from the store, or from `transform.load`.
    """
    context = job.parts.context
    if not transform.learned:
        return transform.fit(context, subject)
    section = job.plan.settings["transform"]
    facts = placement_facts(job.plan, transform)
    if section.get("load") is not None:
        path = Path(section["load"])
        job.run.event("placement", source=str(path))
        placement = job.ranks.lead(lambda: file.load(path, transform, context))
    else:
        key = job.plan.fit_id(part, transform.sees, transform.settled(context))
        path = job.store.shared("placements", key).with_suffix(".safetensors")
        with job.store.holding(path):
            placement = None
            if not job.plan.settings["force"]:
                damaged = job.run.damaged
                placement = job.ranks.lead(
                    lambda: file.load_intact(path, transform, context, damaged)
                )
            source = "learned" if placement is None else "store"
            job.run.event("placement", source=source, key=path.stem)
            if placement is None:
                learned = transform.fit(context, subject)

                def kept() -> Placement:
                    file.save(path, learned, facts)
                    # Read again, so that this run goes on with what a later one finds.
                    return file.load(path, transform, context)

                placement = job.ranks.lead(kept)
            else:
                job.reporter.say("transform: learned before, from the store")
    # Blocks solved under other matrices do not belong to this run.
    digest = job.ranks.lead(lambda: hashlib.sha256(path.read_bytes()).hexdigest())
    job.run.placement = digest[:16]
    if section.get("save") is not None and job.ranks.first:
        file.save(Path(section["save"]), placement, facts, job.plan.learned_id)
    return placement


@torch.no_grad()
def _logits(adapter: Adapter, probe: Tensor) -> Tensor:
    return adapter.model(probe, use_cache=False).logits


def _changes(transform: Transform) -> bool:
    """Whether a transform that promises to change nothing touches any weight at all."""
    return transform.exact and not isinstance(transform, Identity)


def _flat(row: Mapping) -> dict:
    """{"before": {"kurtosis"}} -> {"before_kurtosis"}, for tables."""
    plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
    nested = {
        f"{key}_{name}": x
        for key, value in row.items()
        if isinstance(value, dict)
        for name, x in value.items()
    }
    return plain | nested
