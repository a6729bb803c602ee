"""The stage between fitting and tuning: formats are allocated where they are chosen by measured
sensitivity, and the weights solved block by block, or found as they were solved before.

quantize/ knows the loop over blocks; here stands what of it is stored, told and shared with others.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from harness import store as records
from harness.checkpoints.encodings import inputs, save_encodings
from harness.config.build import fingerprint
from harness.formats import Scheme
from harness.models import merge
from harness.models.adapter import Adapter
from harness.pipeline.build import Components
from harness.pipeline.solvable import reads_hessian
from harness.pipeline.state import LoadedJob
from harness.pipeline.told import doubts, reported, starved
from harness.quantize import blocks
from harness.quantize.allocation import Auto, allocate, sensitivities
from harness.quantize.untouched import Untouched
from harness.quantize.weights import solved


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
