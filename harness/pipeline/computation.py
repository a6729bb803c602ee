"""What a run computes, stage after stage; a file of each says what it does to the model.

load -> baseline -> transform, fold, gate -> blocks: statistics, solve, swap, save
     -> tune -> evaluate -> export
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.calibration.cache import calibrate
from harness.calibration.windows import (
    NEEDED,
    bos_gain,
    in_turn,
    refuse_unknown_ids,
    windows,
    without,
)
from harness.config.errors import ConfigError, DataError
from harness.evaluation.caveats import marks
from harness.evaluation.divergence import Reference
from harness.models.adapter import Adapter
from harness.models.attention import attach
from harness.models.online import online
from harness.models.source import assert_finite
from harness.parallel import ALONE
from harness.pipeline import export, fitting, measure, solving, tuning
from harness.pipeline.state import Job, LoadedJob
from harness.pipeline.texts import sharing
from harness.structure.derive import derive
from harness.structure.structure import Structure

PROBE_WINDOWS = 2  # on which the gate compares logits
PROBE_LENGTH = 128


def compute(start: Job, device: torch.device) -> None:
    """Fill the metrics of a run, and its store. Raises what goes wrong."""
    plan = start.plan
    with start.stage("load"):
        job, adapter = _load(start, device)
        calibration, fresh = _read_texts(job, adapter)
    measure.baseline(job, adapter)

    probe = calibration[:PROBE_WINDOWS, :PROBE_LENGTH].to(device)
    changed = False
    if not plan.model.quantized:  # what is quantized already is measured as it is
        changed = fitting.transform(job, adapter, calibration, probe)
    job.metrics["online"] = online(adapter)
    # What is exact need not be evaluated, for the gate has found the same logits; unless the run
    # quantizes nothing, and the transformed model is its result.
    subject = None
    inexact = not all(transform.exact for transform in job.parts.transforms)
    if inexact or (changed and not plan.quantizes):
        subject = measure.evaluate(job, "transformed", adapter)
    if plan.quantizes:
        _quantize(job, adapter, calibration, fresh)
        subject = measure.evaluate(job, "quantized", adapter)
    # A float model's weights have the bits of their dtype; a checkpoint's are not known here.
    if job.metrics["bits_per_weight"] is None and not plan.model.quantized:
        job.metrics["bits_per_weight"] = float(torch.finfo(adapter.model.dtype).bits)
    exporter = job.parts.exporter
    if exporter is not None:
        alone = replace(job, run=job.run.alone(), ranks=ALONE)

        def written() -> None:
            folder = export.export(alone, adapter, exporter)
            if subject is not None:
                measure.exported(alone, replace(subject, ranks=ALONE), folder)

        job.ranks.lead(written)


def _load(start: Job, device: torch.device) -> tuple[LoadedJob, Adapter]:
    """The run with its model, which is finite."""
    plan = start.plan
    model, tokenizer = plan.model.load(device)
    if start.parts.exporter is not None:
        start.parts.exporter.check_tokenizer(tokenizer)
    start.metrics["warnings"] += plan.model.warnings
    assert_finite(model)
    if not plan.model.quantized:  # a checkpoint's linears are not the model's own
        confirm(model, start.parts.structure)
    offloaded = plan.model.offloaded(model, start.scratch)
    adapter = Adapter(model, offloaded, start.parts.structure)
    job = LoadedJob(
        plan=plan,
        parts=start.parts,
        store=start.store,
        run=start.run,
        reporter=start.reporter,
        tracker=start.tracker,
        metrics=start.metrics,
        scratch=start.scratch,
        ranks=start.ranks,
        tokenizer=tokenizer,
        amp=None if plan.model.amp is None else getattr(torch, plan.model.amp),
        offloaded=offloaded,
        # Now: whatever changes the model later would change what it is compared with.
        reference=Reference(adapter),
    )
    return job, adapter


def _read_texts(job: LoadedJob, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Tokenize and cut the texts of the run: job.texts, and the windows [N, L] that calibrate and
    that a tuner learns from."""
    plan = job.plan
    evaluated = {c.name: measure.tokens(job, c, "evaluation") for c in plan.corpora}
    cut = plan.evaluation
    where = _bos(job, adapter, next(iter(evaluated.values())))
    bos = _bos_token(job)
    every = bos if where == "window" else None
    evaluated = {name: _begun(ids, bos, where) for name, ids in evaluated.items()}
    for name, ids in evaluated.items():
        job.texts[name] = windows(ids, cut.length, cut.count, field="eval.perplexity", bos=every)
    # Of a run that calibrates nothing: for the gate to probe with.
    calibration = fresh = next(iter(job.texts.values()))
    texts = evaluated
    if plan.calibrates:
        read = [measure.tokens(job, c, "calibration") for c in plan.calibration_corpora]
        begun = [_begun(ids, bos, where) for ids in read]
        texts = evaluated | {
            f"{c.name} (calibration)": ids for c, ids in zip(plan.calibration_corpora, begun)
        }
        calibration, fresh = _calibration(job, begun, every)
    # A tokenizer of another model gives ids that would end in an error deep inside torch.
    for name, ids in texts.items():
        refuse_unknown_ids(name, ids, _rows(adapter))
    job.metrics["marks"] = _marks(job, evaluated)
    return calibration, fresh


def confirm(model: nn.Module, told: Structure) -> None:
    """Raises DataError where a loaded model is not what was derived from its config."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # blocks on disk were made from the config, and read into its shapes
    loaded = derive(model)
    for field in ("sites", "attention", "embedding", "head", "final_norm"):
        if getattr(loaded, field) != getattr(told, field):
            raise DataError(
                f"model: the {field} of the {told.architecture} that was loaded are not those that "
                "its config tells; take config and files of one model, and the transformers "
                "release that it asks for"
            )


def _bos(job: LoadedJob, adapter: Adapter, ids: Tensor) -> str:
    """Where a BOS stands: as the run says, or as the model needs it (then it stands in the notes).

    ids: tokens of an evaluated text.
    """
    where = job.plan.bos
    bos = _bos_token(job)
    if where == "window" and bos is None:
        raise ConfigError("data.bos=window: this model's tokenizer has no BOS; set data.bos=none.")
    if where != "auto" or bos is None:
        return where
    probe = ids[: job.plan.evaluation.length]
    refuse_unknown_ids("data", torch.cat([probe, probe.new_tensor([bos])]), _rows(adapter))
    gain = bos_gain(adapter.model, probe, bos, job.ranks)
    if gain <= NEEDED:
        return "auto"
    job.metrics["notes"]["bos"] = f"in every window, for {gain:.2f} nats a token less"
    return "window"


def _bos_token(job: LoadedJob) -> int | None:
    """The token that begins a text, where the tokenizer has one."""
    token = job.tokenizer.bos_token_id
    return token if isinstance(token, int) else None


def _begun(ids: Tensor, bos: int | None, where: str) -> Tensor:
    """A text's token ids with a BOS at their start or not; auto: as the tokenizer has it."""
    if where == "auto" or bos is None:
        return ids
    text = without(ids, bos)
    return torch.cat([text.new_tensor([bos]), text]) if where == "first" else text


def _rows(adapter: Adapter) -> int:
    """How many tokens the model knows."""
    return adapter.model.get_input_embeddings().num_embeddings


def _calibration(job: LoadedJob, texts: Sequence[Tensor], bos: int | None) -> tuple[Tensor, Tensor]:
    """The windows [N, L] that calibrate, of the token ids of all texts that do, and those that a
    tuner learns from; bos: that begins each."""
    corpora = job.plan.calibration_corpora
    whole = job.plan.calibration.within(min(map(len, texts)))
    solving = whole.count
    more = job.parts.tuner.windows if job.parts.tuner is not None else None
    if more is not None and solving is not None:
        whole = replace(whole, count=solving + more)
    seed = job.plan.settings["seed"]
    pieces = []
    for corpus, ids, cut in zip(corpora, texts, whole.shares(len(texts))):
        with sharing(corpus, corpora):
            pieces.append(windows(ids, cut.length, cut.count, cut.order, seed, bos=bos))
    cut = in_turn(pieces)
    calibration = cut[:solving]
    count, length = calibration.shape
    used: dict[str, int | str] = {"windows": count, "length": length}
    note = f"{count} x {length} tokens"
    if len(corpora) > 1:
        used["corpus"] = " + ".join(corpus.name for corpus in corpora)
        note += f" of {used['corpus']}"
    job.metrics["calibration"] = used
    if whole.count is None or len(corpora) > 1:
        job.metrics["notes"]["calibration"] = note
    return calibration, calibration if more is None else cut[solving:]


def _marks(job: LoadedJob, evaluated: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What must be said beside the numbers. evaluated: the token ids of each text, whole."""
    plan = job.plan
    length = plan.evaluation.length
    limits: dict[str, int | None] = {}
    for evaluation in plan.evaluations.values():
        limits |= evaluation.limits()
    return marks(
        plan.calibrated,
        learned=any(transform.learned for transform in job.parts.transforms),
        loaded=plan.settings["transform"].get("load") is not None,
        measured={
            name: (len(job.texts[name]), len(ids) // length) for name, ids in evaluated.items()
        },
        tasks=limits,
        tuned=job.parts.tuner is not None,
    )


def _quantize(job: LoadedJob, adapter: Adapter, calibration: Tensor, fresh: Tensor) -> None:
    """Quantize weights, activations, keys and values, whichever the run does.

    calibration: token ids [N, L]; fresh: those that a tuner learns from.
    """
    auto = job.parts.auto
    if auto is not None:
        # Here, and not when the parts are built: it takes gradients of the transformed model.
        scheme = solving.allocation(job, adapter, calibration, auto)
        job.parts = replace(job.parts, scheme=scheme)
    scheme = job.parts.scheme
    tuning.keep_solved(job, adapter)
    if scheme.any("weight") or scheme.any("act"):
        # Several evaluations of one quantized model solve it once.
        with job.store.holding(job.store.shared("solving", job.plan.quant_id)):
            solving.quantize(job, adapter, calibration)
    if scheme.kv is not None:
        if scheme.kv.needs_static:
            count = len(adapter.blocks)
            with job.stage("solve"), job.reporter.stage("keys and values", count) as advance:
                calibrate(adapter, scheme.kv, calibration, advance, job.ranks)
        for heads in attach(adapter):
            heads.format = scheme.kv
    if job.parts.tuner is not None:
        tuning.tune(job, adapter, fresh, job.parts.tuner)
