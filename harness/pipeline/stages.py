"""What happens to a model between the baseline and the last evaluation: transforms fitted and
placed, formats allocated, weights solved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness import store as records
from harness.calibration.outliers import outliers, profiles
from harness.calibration.subject import StreamedModel
from harness.checkpoints.encodings import inputs, save_encodings
from harness.config.build import fingerprint
from harness.evaluation.gate import exact_logits, gate, stream_gate, text_gate
from harness.formats import Scheme
from harness.models import merge
from harness.models.adapter import Adapter
from harness.pipeline.build import Components
from harness.pipeline.combinations import placement_facts
from harness.pipeline.solvable import reads_hessian
from harness.pipeline.state import LoadedJob
from harness.pipeline.told import doubts, reported, starved
from harness.quantize import blocks
from harness.quantize.allocation import Auto, allocate, sensitivities
from harness.quantize.untouched import Untouched
from harness.quantize.weights import solved
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


def allocation(job: LoadedJob, adapter: Adapter, calibration: Tensor, auto: Auto) -> Scheme:
    """The scheme with every linear's weight format chosen by measured sensitivity; what it chose
    stands in the notes."""
    scheme = job.parts.scheme
    key = fingerprint(job.plan.allocation_id(), job.run.placement)
    path = job.store.shared("sensitivities", key)
    with job.stage("allocate"), job.store.holding(path):
        record = None
        if not job.plan.settings["force"]:
            record = job.ranks.lead(lambda: records.read_record(path, job.run.damaged))
        if record is None:
            with job.reporter.stage("sensitivities", len(adapter.blocks)) as advance:
                rows = sensitivities(adapter, auto, calibration, advance, job.ranks)
            record = {"rows": rows}
            if job.ranks.first:
                records.write_record(path, record)
    overrides = {where: dict(parts) for where, parts in scheme.overrides.items()}
    # The record has every linear, for other runs with other overrides.
    undecided = [
        row
        for row in record["rows"]
        if "weight" not in overrides.get((row["layer"], row["name"]), {})
    ]
    names = allocate(undecided, auto.bits_per_weight)
    table = []
    for row, name in zip(undecided, names):
        where = (row["layer"], row["name"])
        overrides.setdefault(where, {})["weight"] = auto.candidates[name]
        table.append({"name": adapter.name(*where), "format": name})
    # Blocks solved under another allocation do not belong to this run.
    job.run.placement += fingerprint(names)
    job.metrics["notes"]["allocation"] = {name: names.count(name) for name in auto.candidates}
    job.tracker.table("allocation", table)
    return replace(scheme, overrides=overrides)


def _reads(parts: Components) -> bool:
    """Whether solving makes anything of the calibration text, rather than only measuring errors on
    it."""
    scheme = parts.scheme
    solver = parts.solver
    acts = [scheme.act, *(formats.get("act") for formats in scheme.overrides.values())]
    if any(act is not None and act.needs_static for act in acts):
        return True
    if solver is None:
        return False
    return solver.prepares or solver.scope == "block" or reads_hessian(solver, scheme, parts.auto)


def quantize(job: LoadedJob, adapter: Adapter, calibration: Tensor) -> None:
    """Solve the weights block by block, going on from what the store has; reports, encodings and
    bits per weight."""
    settings = job.plan.settings
    scheme = job.parts.scheme
    solver = job.parts.solver
    if not _reads(job.parts):
        # Fewer windows give the same weights, and errors near those of all.
        calibration = calibration[: settings["eval"]["layer_windows"]]
    count = len(adapter.blocks)
    present = 0 if settings["force"] else job.store.adopt_blocks(job.run, job.plan.quant_id)
    if present:
        job.reporter.say(f"quantize: {present} of {count} blocks are in the store")
    # What stands outside the blocks is one more block at their end.
    total = count + scheme.outside
    on_disk = settings["data"]["calibration"]["activations"] == "disk"
    with job.stage("solve"), job.reporter.stage("quantize", total) as advance:
        blocks.quantize(
            adapter,
            scheme,
            solver,
            calibration,
            job.run,
            reported(job, count, advance),
            settings["seed"],
            stage=job.reporter.stage,
            folder=job.scratch if on_disk else None,
            log=job.tracker.log,
            enough=job.plan.enough,
            untouched=_untouched(job, adapter) if present < total else None,
            ranks=job.ranks,
        )
        write_encodings(job, adapter)
    layers = job.metrics["layers"]
    job.metrics["warnings"] += doubts(layers)
    if job.plan.enough is not None:
        job.metrics["warnings"] += starved(layers, job.plan.enough)
    if solver is not None:
        job.metrics["warnings"] += solver.idle(layers)
    weights = sum(layer.get("weights", 0) for layer in layers)
    bits = sum(layer.get("bits", 0) for layer in layers)
    if weights:  # without a solver none are counted
        job.metrics["bits_per_weight"] = bits / weights


def _untouched(job: LoadedJob, adapter: Adapter) -> Untouched | None:
    """The model loaded again, where a solver compares with it and a decoder is free."""
    solver = job.parts.solver
    free = any(transform.free_decoder for transform in job.parts.transforms)
    if solver is None or solver.propagate == "none" or not free:
        return None
    model, _ = job.plan.model.load(adapter.device)
    model.requires_grad_(False)
    untouched = Adapter(model, structure=adapter.structure)
    merge.swap(untouched)
    return Untouched(untouched, job.placements)


def write_encodings(job: LoadedJob, adapter: Adapter) -> None:
    """Encodings of weights and inputs, for a solver that has a folder of them."""
    solver = job.parts.solver
    if solver is None or solver.encodings is None:
        return
    scheme = job.parts.scheme
    # From the files of the blocks, for some may be of an earlier attempt.
    count = len(adapter.blocks) + scheme.outside
    alone = job.run.alone()
    blocks = (solved(adapter, scheme, alone, index) for index in range(count))
    folder = job.run.path / solver.encodings
    job.ranks.lead(lambda: save_encodings(folder, blocks, inputs(adapter)))
