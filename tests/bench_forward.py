"""Bench parts around a forward of the whole model: evaluation, learning, online codecs."""

from __future__ import annotations

import copy
import time

import torch
from bench_models import EVALUATION, load, nvfp4, quantized, row

from harness.calibration.subject import StreamedModel
from harness.calibration.windows import windows
from harness.config.build import build, option
from harness.evaluation.perplexity import window_losses
from harness.formats import Scheme
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import fuse_norms, swap
from harness.models.quant_linear import QuantLinear
from harness.solvers import RTN
from harness.transforms import Blocks, ModelShape, Placement, Transform
from harness.transforms.learn import Orthogonal
from harness.transforms.losses import loss_of


def evaluation() -> None:
    model, tokens = load()
    cut = windows(tokens["evaluation"], EVALUATION[1], EVALUATION[0])
    other = quantized(copy.deepcopy(model), nvfp4(), RTN(), windows(tokens["calibration"], 512, 4))
    plain = Adapter(model)
    for threads, clock, bound in (
        (1, time.process_time, "at most 1.25, aim 1.15"),
        (2, time.perf_counter, "aim 1.35"),
    ):
        torch.set_num_threads(threads)
        window_losses(plain, cut[:1, :512])
        seconds = [0.0, 0.0]
        for window in cut:
            for side, adapter in enumerate((plain, other)):
                start = clock()
                window_losses(adapter, window[None])
                seconds[side] += clock() - start
        row(f"float32 forward, {cut.numel()} tokens, {threads} thread(s)", seconds[0], "s")
        row(f"NVFP4 W4A4 forward, {threads} thread(s)", seconds[1], "s")
        row(f"ratio on {threads} thread(s)", seconds[1] / seconds[0], "", bound)


def subject_of(model, ids) -> tuple[StreamedModel, ModelShape]:
    """The model ready for a residual transform, and what the transforms know of it. NVFP4
    activations."""
    adapter = Adapter(model)
    swap(adapter)
    fuse_norms(adapter)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    context = shape_of(Adapter(model).structure, Scheme(act=nvfp4().act))
    return StreamedModel(adapter, ids), context


def learning() -> None:
    """Seconds of one distillation step, codecs and optimizer included and the teacher's forward
    not, against forward and backward of the same tokens."""
    torch.set_num_threads(1)
    model, tokens = load()
    subject, context = subject_of(model, windows(tokens["calibration"], 512, 4))
    weights = [m.weight for m in model.modules() if isinstance(m, QuantLinear)] + list(
        model.parameters()
    )
    transforms = {
        name: build(own_settings(name), "transform", Transform)
        for name in ("adacodec", "spinquant")
    }

    def plain(ids) -> float:
        for weight in weights:
            weight.requires_grad_(True)
        start = time.process_time()
        with subject.unmerged(Placement(), context.scheme):
            loss_of(subject.logits(ids), ids, None).backward()
        seconds = time.process_time() - start
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
        return seconds

    def step(transform, moving, ids, teacher) -> float:
        start = time.process_time()
        with subject.unmerged(transform.build(context, subject, moving.matrices()), context.scheme):
            loss_of(subject.logits(ids), ids, teacher).backward()
        moving.step()
        return time.process_time() - start

    moving = {
        name: Orthogonal(t.start(context, subject), t.descent) for name, t in transforms.items()
    }
    bounds = {
        ("adacodec", 512): "at most 1.4",
        ("adacodec", 2048): "at most 1.0",
        ("spinquant", 512): "at most 1.7",
        ("spinquant", 2048): "at most 1.2",
    }
    for length in (512, 2048):
        ids = windows(tokens["calibration"], length, 1)
        with torch.no_grad():
            teacher = subject.logits(ids)
        plain(ids)
        seconds = {"plain": 0.0, "adacodec": 0.0, "spinquant": 0.0}
        for _ in range(3):
            seconds["plain"] += plain(ids)
            for name, transform in transforms.items():
                seconds[name] += step(transform, moving[name], ids, teacher)
        row(f"forward and backward, {length} tokens", seconds["plain"] / 3, "CPU s")
        for name in transforms:
            row(
                f"step of {name} / that", seconds[name] / seconds["plain"], "", bounds[name, length]
            )


@torch.no_grad()
def online() -> None:
    """CPU seconds of the NVFP4 W4A4 forward with online codecs over those without. The weights'
    values do not matter."""
    torch.set_num_threads(1)
    model, tokens = load()
    cut = windows(tokens["evaluation"], EVALUATION[1], 2)
    subject, context = subject_of(model, cut)
    adapter, act = subject.adapter, nvfp4().act.dynamic()
    inputs = [m.site for m in adapter.model.modules() if isinstance(m, QuantLinear)]
    for site in inputs:
        site.format = act
    widths = context.widths
    hadamard = build(own_settings("hadamard"), "transform", Transform).fit(context, subject)
    encoders = {(None, site): Blocks(torch.randn(n // 64, 64, 64)) for site, n in widths.items()}
    r4 = {
        (None, "down_in"): build(own_settings("quarot"), "transform", Transform).draw(
            context, widths["down_in"], "R4"
        )
    }
    wush = {(None, site): Blocks(torch.randn(n // 16, 16, 16)) for site, n in widths.items()}
    dense = {(None, site): Blocks(torch.randn(1, n, n)) for site, n in widths.items()}
    variants = {
        "none": {},
        "Hadamard blocks of 64 at every site": hadamard.online,
        "QuaRot's R4": r4,
        "block encoders of 64 at every site": encoders,
        "WUSH's blocks of 16 at every site": wush,
        "PCA, dense at every site": dense,
    }
    seconds = dict.fromkeys(variants, 0.0)
    for _ in range(2):
        for window in cut:
            for name, placed in variants.items():
                for role in adapter.roles.values():
                    if role.kind == "linear" and role.layer is not None:
                        linear = adapter.blocks[role.layer].get_submodule(role.name)
                        linear.site.codec = Placement(online=placed).encoder(role.layer, role.reads)
                start = time.process_time()
                window_losses(adapter, window[None])
                seconds[name] += time.process_time() - start
    plain = seconds.pop("none")
    row("NVFP4 W4A4 forward", plain / 4, "CPU s")
    own = {
        "WUSH's blocks of 16 at every site": "at most 1.10",
        "PCA, dense at every site": "reported",
    }
    for name, value in seconds.items():
        bound = own.get(name, "at most 1.15 (Hadamard and encoders together)")
        row(f"with {name}", value / plain, "", bound)


def own_settings(name: str) -> dict:
    """The constructor's part of an option of conf/transform."""
    return {
        k: v
        for k, v in option("transform", name).items()
        if k not in ("name", "smooth", "save", "load")
    }
