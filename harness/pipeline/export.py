"""From an evaluated model to a checkpoint folder: written beside, loaded back, compared, named.

The reload gate compares what a user of the checkpoint gets with what was evaluated: every quantized
weight in every bit, in the dtype in which the file is served, and, in that of the evaluation, the
perplexity of the first two windows of each corpus, within the layout's tolerance (of weights
rounded as the file holds them; of float activations where it holds weights alone). Whatever fails
leaves no folder of that name, and an older one as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.checkpoints.about import ABOUT, about
from harness.checkpoints.base import Exporter, Snapshot, cast
from harness.checkpoints.card import card
from harness.checkpoints.folder import digests, write_checkpoint
from harness.checkpoints.metadata import metadata
from harness.checkpoints.names import name_of
from harness.checkpoints.saved import upload
from harness.config.errors import DataError
from harness.evaluation.perplexity import perplexity, window_losses
from harness.formats import QTensor
from harness.models.adapter import Adapter
from harness.models.attention import HeadsInput
from harness.models.quant_linear import SiteInput
from harness.pipeline.state import LoadedJob
from harness.quantize.weights import Solved
from harness.store import locked, write, write_json

WINDOWS = 2  # of each corpus, on which the loaded model is compared
LOST = 100  # above this perplexity a model has lost its text,
SLACK = 10  # and a tie that falls otherwise moves it that much more
ROUNDING = 1e-12  # between perplexities that are the same


def export(job: LoadedJob, adapter: Adapter, exporter: Exporter) -> Path:
    """Write, check and name the run's checkpoint; returns its folder, what it is stands in the
    metrics.

    Raises DataError where it does not come back as it was evaluated.
    """
    section = job.plan.settings["export"]
    run_id = job.plan.run_id
    snapshot = Snapshot(
        adapter,
        job.tokenizer,
        job.parts.scheme,
        job.placements,
        Solved(adapter, job.parts.scheme, job.run),
        job.plan.settings,
        job.plan.choices,
        job.metrics,
        job.plan.model.origin(),
    )
    folder = Path(section["path"])
    name = str(name_of(snapshot))
    beside = folder / f".{name}.{run_id[-10:]}"  # this run's alone, for it holds its lock
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with job.stage("export"):
            write_checkpoint(exporter, snapshot, beside)
            write_json(beside / "digests.json", digests(beside))
            compared = _gate(job, exporter, snapshot, beside)
            # Runs that differ in what a name does not say may end at the same time.
            with locked(folder / f".{name}.lock", wait=True):
                final = _free(folder, name, run_id)
                description = metadata(snapshot, exporter, final.name, beside)
                write_json(beside / ABOUT, description)
                write(beside / "README.md", card(description, exporter))
                # Again, for the files that have come since the gate read them.
                write_json(beside / "digests.json", digests(beside))
                _replace(final, beside)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"export.path={section['path']}: {error}; nothing was left there."
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    job.metrics["export"] = {
        "path": str(final),
        "name": final.name,
        "sizes": description["sizes"],
        **compared,
    }
    job.reporter.say(f"exported: {final}")
    if section["push_to"] is not None:
        upload(final, section["push_to"], private=True)
    return final


def _free(folder: Path, name: str, run_id: str) -> Path:
    """Where the checkpoint goes: a name says less than a run's settings, so one that another run
    has gets this run's mark. What a killed replacement left is mended first."""
    aside = _aside(folder / name)
    if aside.exists() and not (folder / name).exists():
        aside.rename(folder / name)
    shutil.rmtree(aside, ignore_errors=True)
    taken = (folder / name).exists() and about(folder / name).get("run_id") != run_id
    if taken:
        return folder / f"{name}.{run_id[-10:]}"
    return folder / name


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _gate(job: LoadedJob, exporter: Exporter, snapshot: Snapshot, folder: Path) -> dict:
    """{"weights": how many were compared, "ppl": {corpus: [as evaluated, as loaded]}}."""
    dtype = snapshot.adapter.model.dtype
    stored = exporter.stored(snapshot)
    model = exporter.load(folder, snapshot.adapter.device, stored or dtype)
    # Before the loaded model is cast to the dtype of the evaluation.
    for name, qtensor in snapshot.qtensors.items():
        weight = exporter.weight(model, name)
        if not torch.equal(weight, _decoded(qtensor, weight.dtype).to(weight.device)):
            raise DataError(
                f"export={exporter.name}: {name} does not come back from the checkpoint "
                "as it was evaluated"
            )
    if stored is not None:
        _round(snapshot, stored)
        cast(model, stored, dtype)
    if exporter.weights_alone:
        _read_floats(snapshot)
    loaded = Adapter(model)
    streaming = job.offloaded is not None  # the loaded model is in memory
    ppl = {}
    for corpus, text in job.texts.items():
        windows = text[:WINDOWS]
        length = windows.shape[1]
        losses = window_losses(snapshot.adapter, windows, job.amp, streaming=streaming)
        evaluated = perplexity(losses, length)
        got = perplexity(window_losses(loaded, windows, job.amp, streaming=False), length)
        ppl[corpus] = [evaluated, got]
        if not abs(got / evaluated - 1) <= _tolerance(exporter, evaluated):
            raise DataError(
                f"export={exporter.name}: perplexity on {corpus} is {got:.6f} from the checkpoint "
                f"and {evaluated:.6f} as evaluated"
            )
    return {"weights": len(snapshot.qtensors), "ppl": ppl}


def _tolerance(exporter: Exporter, evaluated: float) -> float:
    """The relative difference that the loaded model's perplexity may have."""
    if exporter.tolerance is None:
        return ROUNDING
    return exporter.tolerance * (SLACK if evaluated > LOST else 1)


def _decoded(q: QTensor, dtype: torch.dtype) -> Tensor:
    """The evaluated weight in the dtype in which a file is served."""
    if dtype == q.dtype:
        return q.dequantize()
    # From float32, for a value that was rounded to the model's dtype would be rounded twice.
    return q.format.decode(q.codes, q.scales).to(dtype)


@torch.no_grad()
def _round(snapshot: Snapshot, dtype: torch.dtype) -> None:
    """Give every weight and bias of the evaluated model, which is not needed any more, the value
    that the file holds.

    Rounding moves some activations to another code, and these move others: it must not count as a
    fault of the file.
    """
    adapter = snapshot.adapter
    qtensors = snapshot.qtensors
    inside = f"{adapter.structure.blocks}."
    for layer in (None, *range(len(adapter.blocks))):
        root = adapter.model if layer is None else adapter.blocks[layer]
        with adapter.open(layer, write=True):
            for name, module in root.named_modules():
                if layer is None and name.startswith(inside):
                    continue
                for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
                    if isinstance(tensor, Tensor):  # some modules have a flag of that name
                        tensor.copy_(tensor.to(dtype))
                quantized = qtensors.get(name if layer is None else f"{inside}{layer}.{name}")
                if quantized is not None:
                    module.weight.copy_(_decoded(quantized, dtype))


def _read_floats(snapshot: Snapshot) -> None:
    """Have the evaluated model, which is not needed any more, quantize no activation, key or
    value."""
    for module in snapshot.adapter.model.modules():
        if isinstance(module, SiteInput | HeadsInput):
            module.format = None


def _replace(final: Path, beside: Path) -> None:
    """Give the folder its name, with what had it before out of the way only for the moment between
    two renames."""
    if final.exists():
        final.rename(_aside(final))
    beside.rename(final)
    shutil.rmtree(_aside(final), ignore_errors=True)
