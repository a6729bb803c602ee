"""What happens to a model between the baseline and the last evaluation: transforms fitted and placed, formats allocated,
weights solved. Each function takes the job (pipeline.Job): its plan, parts, run, reporter, tracker, metrics.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness import store as records
from harness.calibration.outliers import outliers, profiles
from harness.calibration.subject import StreamedModel
from harness.checkpoints.encodings import save_encodings
from harness.config.build import fingerprint
from harness.evaluation.gate import exact_logits, gate, stream_gate
from harness.formats import Scheme
from harness.models import merge
from harness.models.adapter import Adapter
from harness.pipeline.build import placement_facts
from harness.quantize import blocks
from harness.quantize.allocation import allocate, sensitivities
from harness.quantize.weights import solved
from harness.transforms import Placement, file
from harness.transforms.identity import Identity


def transform(job, adapter: Adapter, calibration: Tensor, probe: Tensor) -> bool:
    """Fit (or find) and place every transform, and hold exact ones to the gate. Whether anything changed."""
    transforms, changed = job.parts.transforms, False
    with job.stage("fit"):
        if job.plan.calibrates:
            job.metrics["notes"]["stream"] = stream_gate(adapter, calibration[:1])
        before, exact = _logits(adapter, probe), None
        if adapter.model.dtype not in (torch.float32, torch.float64) and any(
            map(_changes, transforms)
        ):
            exact = exact_logits(adapter, probe)
        merge.swap(adapter)
        untouched = profiles(adapter, calibration) if job.plan.calibrates else {}
        gains = (
            merge.fuse_norms(adapter)
            if any(transform.residual for transform in transforms)
            else None
        )
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)
        subject = StreamedModel(adapter, calibration, job.reporter.stage, gains, job.tracker.log)
        for part, transform in enumerate(transforms):
            placement = fitted(job, part, transform, subject)
            changed = changed or not placement.empty
            if placement.empty and not isinstance(transform, Identity):
                told = f"transform={transform.name} placed nothing, so this is transform=identity"
                job.metrics["warnings"].append(told)
            job.metrics["notes"] |= dict(placement.notes)
            merge.place(adapter, placement)
            job.placements.append(placement)
        if all(transform.exact for transform in transforms):
            after, name = _logits(adapter, probe), job.plan.settings["transform"]["name"]
            job.metrics["notes"]["gate"] = gate(before, after, name, exact)
        if job.plan.calibrates:
            found = outliers(untouched, profiles(adapter, calibration) if changed else untouched)
            job.run.save("outliers.json", found)
            job.tracker.table("outliers", [_flat(row) for row in found["rows"]])
    return changed


@torch.no_grad()
def _logits(adapter: Adapter, probe: Tensor) -> Tensor:
    return adapter.model(probe, use_cache=False).logits


def _changes(transform) -> bool:
    """Whether a transform that promises to change nothing touches any weight at all."""
    return transform.exact and not isinstance(transform, Identity)


def _flat(row: dict) -> dict:
    """{"before": {"kurtosis"}} -> {"before_kurtosis"}, for tables."""
    nested = {
        f"{key}_{name}": x
        for key, value in row.items()
        if isinstance(value, dict)
        for name, x in value.items()
    }
    return {key: value for key, value in row.items() if not isinstance(value, dict)} | nested


def fitted(job, part: int, transform, subject: StreamedModel) -> Placement:
    """What a transform fits; what it has learned before is taken from the store, or from `transform.load`."""
    if not transform.learned:
        return transform.fit(job.parts.context, subject)
    section, context, facts = (
        job.plan.settings["transform"],
        job.parts.context,
        placement_facts(job.plan, transform),
    )
    if section.get("load") is not None:
        path = Path(section["load"])
        job.run.event("placement", source=str(path))
        placement = file.load(path, transform, context)
    else:
        path = job.store.shared("placements", job.plan.fit_id(part, transform.sees)).with_suffix(
            ".safetensors"
        )
        with job.store.holding(path):
            force, damaged = job.plan.settings["force"], job.run.damaged
            placement = None if force else file.load_intact(path, transform, context, damaged)
            job.run.event(
                "placement", source="learned" if placement is None else "store", key=path.stem
            )
            if placement is None:
                file.save(path, transform.fit(context, subject), facts)
                placement = file.load(path, transform, context)
            else:
                job.reporter.say("transform: learned before, from the store")
    job.run.placement = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if section.get("save") is not None:
        file.save(Path(section["save"]), placement, facts, job.plan.learned_id)
    return placement


def allocation(job, adapter: Adapter, calibration: Tensor) -> Scheme:
    """The scheme with every linear's weight format chosen by measured sensitivity; what it chose stands in the notes."""
    auto, scheme = job.parts.auto, job.parts.scheme
    path = job.store.shared(
        "sensitivities", fingerprint(job.plan.allocation_id(), job.run.placement)
    )
    with job.stage("allocate"), job.store.holding(path):
        known = None if job.plan.settings["force"] else records.read_record(path, job.run.damaged)
        if known is None:
            with job.reporter.stage("sensitivities", len(adapter.blocks)) as advance:
                known = {"rows": sensitivities(adapter, auto, calibration, advance)}
            records.write_record(path, known)
    rows = known["rows"]
    overrides = {where: dict(own) for where, own in scheme.overrides.items()}
    rows = [
        row for row in rows if "weight" not in overrides.get((row["layer"], row["name"]), {})
    ]  # those are decided
    chosen = allocate(rows, auto.bits_per_weight)
    for row, name in zip(rows, chosen):
        overrides.setdefault((row["layer"], row["name"]), {})["weight"] = auto.candidates[name]
    job.run.placement += fingerprint(chosen)
    job.metrics["notes"]["allocation"] = {name: chosen.count(name) for name in auto.candidates}
    table = [
        {"name": adapter.name(row["layer"], row["name"]), "format": name}
        for row, name in zip(rows, chosen)
    ]
    job.tracker.table("allocation", table)
    return replace(scheme, overrides=overrides)


def _reads(parts) -> bool:
    """Whether solving makes anything of the calibration text, rather than only measuring errors on it."""
    scheme, solver = parts.scheme, parts.solver
    acts = [scheme.act, *(own.get("act") for own in scheme.overrides.values())]
    if any(act is not None and act.needs_static for act in acts):
        return True
    return solver is not None and bool(solver.needs or solver.prepares or solver.scope == "block")


def quantize(job, adapter: Adapter, calibration: Tensor) -> None:
    """Solve the weights block by block, going on from what the store has; reports, encodings and bits per weight."""
    plan, parts = job.plan, job.parts
    if not _reads(parts):
        calibration = calibration[: plan.settings["eval"]["layer_windows"]]
    found = 0 if plan.settings["force"] else job.store.adopt_blocks(job.run, plan.quant_id)
    if found:
        job.reporter.say(f"quantize: {found} of {len(adapter.blocks)} blocks are in the store")
    outside = parts.scheme.outside
    with (
        job.stage("solve"),
        job.reporter.stage("quantize", len(adapter.blocks) + outside) as advance,
    ):

        def done(index: int, layers: list[dict], output: dict) -> None:
            job.metrics["layers"] += layers
            errors = [
                math.nan if layer["rel_error"] is None else layer["rel_error"] for layer in layers
            ]
            mean = sum(errors) / len(errors)
            note = f"relative output error {mean:.4f}"
            if index == len(
                adapter.blocks
            ):  # embedding and head: no block, so no point of its curves
                job.tracker.log(_outside(layers), step=0)
                return advance(note)
            points = {"block/rel_error": mean, "block/worst_rel_error": max(errors)}
            points |= {f"block/{key}": value for key, value in output.items() if value is not None}
            if "loss_after" in layers[0]:
                points |= {f"block/{key}": layers[0][key] for key in ("loss_before", "loss_after")}
                note += f", loss {layers[0]['loss_before']:.4g} to {layers[0]['loss_after']:.4g}"
            job.tracker.log(points, step=index)
            advance(note)

        on_disk = plan.settings["data"]["calibration"]["activations"] == "disk"
        blocks.quantize(
            adapter,
            parts.scheme,
            parts.solver,
            calibration,
            job.run,
            done,
            plan.settings["seed"],
            stage=job.reporter.stage,
            folder=job.scratch if on_disk else None,
            log=job.tracker.log,
        )
        if parts.solver is not None and parts.solver.encodings is not None:
            for index in range(len(adapter.blocks) + outside):
                qtensors = solved(adapter, parts.scheme, job.run, index)
                save_encodings(job.run.path / parts.solver.encodings, index, qtensors)
    layers = job.metrics["layers"]
    fallbacks = [layer["name"] for layer in layers if layer.get("fallback")]
    if fallbacks:
        job.metrics["warnings"].append(
            f"{len(fallbacks)} linears fell back to RTN (singular H): {', '.join(fallbacks)}"
        )
    damped = [layer["name"] for layer in layers if layer.get("redamped")]
    if damped:
        job.metrics["warnings"].append(
            f"{len(damped)} linears needed more damping than solver.damp: {', '.join(damped)}"
        )
    if parts.solver is not None:
        job.metrics["warnings"] += parts.solver.idle(layers)
    weights = sum(layer.get("weights", 0) for layer in layers)
    job.metrics["bits_per_weight"] = (
        sum(layer.get("bits", 0) for layer in layers) / weights if weights else None
    )


def _outside(layers: list[dict]) -> dict:
    """{"outside/lm_head/rel_error": ..} of what stands outside the blocks."""
    measured = {layer["name"].rpartition(".")[2]: layer for layer in layers}
    return {
        f"outside/{name}/{key}": layer[key]
        for name, layer in measured.items()
        for key in ("rel_error", "sqnr_db")
        if layer.get(key) is not None
    }
