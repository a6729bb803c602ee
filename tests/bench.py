"""Speed and memory as ratios measured in one run: `make bench`, or one part with `make bench ARGS=evaluation`.

Parts: evaluation (NVFP4 W4A4 forward against the float32 forward of the same windows, pair by pair), gptq (CPU seconds of
quantizing against the sum of what cannot be avoided, measured beside it), memory (peak resident memory of quantizing
against the parts it has to hold), learning (a step of a transform that learns end to end against a plain forward and backward
with weight gradients), online (what the parts that stay online add to the NVFP4 forward). Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness.blockwise import quantize
from harness.calibration.corpus import Pydoc
from harness.calibration.statistics import Statistics
from harness.calibration.subject import ModelSubject
from harness.calibration.windows import tokenize, windows
from harness.config import build, option
from harness.evaluation.perplexity import window_losses
from harness.formats import Scheme
from harness.models.families import Adapter, context_of
from harness.models.prepare import fuse_norms, swap
from harness.models.quant_linear import QuantLinear
from harness.solvers import GPTQ, RTN
from harness.store import Run
from harness.transforms import Blocks, Context, Placement
from harness.transforms.learn import Orthogonal, loss_of

CALIBRATION = (32, 512)
EVALUATION = (4, 2048)


def nvfp4() -> Scheme:
    return Scheme(**{k: build(v) for k, v in option("format", "nvfp4").items() if k in ("weight", "act")})


def load():
    model, tokenizer = build(option("model", "smollm2_135m")).load()
    return model, {part: tokenize(tokenizer, Pydoc().text(part)) for part in ("calibration", "evaluation")}


def quantized(model, scheme: Scheme, solver, calibration) -> Adapter:
    adapter = Adapter(model)
    swap(adapter)
    with tempfile.TemporaryDirectory() as folder:
        quantize(adapter, scheme, solver, calibration, Run(Path(folder)), lambda index, layers: None)
    return adapter


def row(name: str, figure: float, unit: str = "", bound: str = "") -> None:
    print(f"{name:<58} {figure:>10.2f} {unit:<8} {bound}", flush=True)


def evaluation() -> None:
    model, tokens = load()
    cut = windows(tokens["evaluation"], EVALUATION[1], EVALUATION[0])
    other = quantized(copy.deepcopy(model), nvfp4(), RTN(), windows(tokens["calibration"], 512, 4))
    plain = Adapter(model)
    for threads, clock, bound in ((1, time.process_time, "at most 1.25, aim 1.15"), (2, time.perf_counter, "aim 1.35")):
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


@torch.no_grad()
def gptq() -> None:
    torch.set_num_threads(1)
    model, tokens = load()
    calibration = windows(tokens["calibration"], CALIBRATION[1], CALIBRATION[0])
    adapter = Adapter(model)
    widths = [adapter.width(site) for site in adapter.family.sites]
    rows = [sum(m.out_features for m in adapter.linears(0, s).values()) for s in adapter.family.sites]

    clock = time.process_time
    start = clock()
    for batch in calibration.split(4):
        adapter.backbone(input_ids=batch, use_cache=False)
    forward = clock() - start

    inputs = [torch.randn(4 * CALIBRATION[1], n) for n in widths]
    start = clock()
    for x in inputs:
        h = torch.zeros(x.shape[1], x.shape[1])
        for _ in range(len(calibration) // 4):
            h.addmm_(x.T, x)
    products = (clock() - start) * len(adapter.blocks)
    start = clock()
    for x in inputs:
        statistics = Statistics(x.shape[1], calibration.numel(), x.device, hessian=True)
        for _ in range(len(calibration) // 4):
            statistics.add(x)
    ours = (clock() - start) * len(adapter.blocks)

    start = clock()
    for x, out in zip(inputs, rows):
        bare_updates(x.T @ x, torch.randn(x.shape[1], out))
    updates = (clock() - start) * len(adapter.blocks)
    floor = forward + products + updates
    row(f"floor: one float32 forward of {calibration.numel()} tokens", forward, "CPU s")
    row("floor: Hessian products as full matmuls", products, "CPU s")
    row("   (ours, half of the square, with maxima and samples)", ours, "CPU s")
    row("floor: factorizations and bare updates", updates, "CPU s")
    row("floor", floor, "CPU s")

    start = clock()
    quantized(model, nvfp4(), GPTQ(), calibration)
    total = clock() - start
    row("NVFP4 W4A4 GPTQ, all blocks", total, "CPU s", "FP-Quant 319, llm-compressor 189 (elsewhere)")
    row("ratio to the floor", total / floor, "", "at most 1.6")


def bare_updates(h: torch.Tensor, w: torch.Tensor, block: int = 32) -> None:
    """What no GPTQ can do without: the factor of H and the error feedback, [in, rows], without any rounding."""
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for lo in range(0, len(w), block):
        hi = lo + block
        for i in range(lo, hi):
            w[i + 1 : hi].addmm_(u[i, i + 1 : hi, None], w[i, None], alpha=-1)
        w[hi:].addmm_(u[lo:hi, hi:].T, w[lo:hi], alpha=-1)


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load()
        model.save_pretrained(folder)
        del model
        # the allocator as a user finds it: one told to keep everything would only show how much it kept
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        line = [sys.executable, __file__, "_peak", folder]
        output = subprocess.run(line, check=True, capture_output=True, text=True, env=env).stdout
    libraries, weights, block, activations, hessians, peak = map(float, output.split()[-6:])
    for name, value in (("model", weights), ("block", block), ("activations", activations), ("3 Hessians", hessians)):
        row(f"memory held: {name}", value, "MB")
    row("importing the libraries", libraries, "MB")
    row("peak resident while quantizing", peak, "MB")
    row("(peak - libraries) / held", (peak - libraries) / (weights + block + activations + hessians), "", "at most 1.25")


def _peak(folder: str) -> None:
    """In a process of its own: quantize, print the parts and the peak in MB."""
    import transformers

    torch.set_num_threads(1)
    tiny, tokenizer = build(option("model", "tiny")).load()
    tokens = tokenize(tokenizer, Pydoc().text("calibration"))
    quantized(tiny, nvfp4(), GPTQ(), windows(tokens, 64, 2))  # a small run, so that all that is imported late is here
    libraries = _resident("VmRSS")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter = Adapter(model)
    calibration = windows(tokens, CALIBRATION[1], CALIBRATION[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    block = sum(p.numel() * p.element_size() for p in adapter.blocks[0].parameters()) / 2**20
    activations = calibration.numel() * model.config.hidden_size * 4 / 2**20
    hessians = 3 * max(adapter.width(s) for s in adapter.family.sites) ** 2 * 4 / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # loading is not what is measured: forget its peak
    quantized(model, nvfp4(), GPTQ(), calibration)
    print(libraries, weights, block, activations, hessians, _resident("VmHWM"))


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def subject_of(model, ids) -> tuple[ModelSubject, Context]:
    """The model ready for a residual transform, and what the transforms know of it. NVFP4 activations."""
    adapter = Adapter(model)
    swap(adapter)
    fuse_norms(adapter)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    context = context_of(model.config.to_dict(), Scheme(act=nvfp4().act))
    return ModelSubject(adapter, ids), context


def learning() -> None:
    """Seconds of one step, codecs and optimizer included, against forward and backward of the same tokens."""
    torch.set_num_threads(1)
    model, tokens = load()
    subject, context = subject_of(model, windows(tokens["calibration"], 512, 4))
    weights = [m.weight for m in model.modules() if isinstance(m, QuantLinear)] + list(model.parameters())
    transforms = {name: build(own_settings(name), "transform") for name in ("adacodec", "spinquant")}

    def plain(ids) -> float:
        for weight in weights:
            weight.requires_grad_(True)
        start = time.process_time()
        with subject.live(Placement(), context.scheme):
            loss_of(subject.logits(ids), ids, None).backward()
        seconds = time.process_time() - start
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
        return seconds

    def step(transform, moving, ids) -> float:
        start = time.process_time()
        with subject.live(transform.build(context, subject, moving.matrices()), context.scheme):
            loss_of(subject.logits(ids), ids, None).backward()
        moving.step()
        return time.process_time() - start

    moving = {name: Orthogonal(t.start(context, subject), t.descent) for name, t in transforms.items()}
    bounds = {("adacodec", 512): "at most 1.4", ("adacodec", 2048): "at most 1.0", ("spinquant", 512): "at most 1.7",
              ("spinquant", 2048): "at most 1.2"}
    for length in (512, 2048):
        ids = windows(tokens["calibration"], length, 1)
        plain(ids)
        seconds = {"plain": 0.0, "adacodec": 0.0, "spinquant": 0.0}
        for _ in range(3):
            seconds["plain"] += plain(ids)
            for name, transform in transforms.items():
                seconds[name] += step(transform, moving[name], ids)
        row(f"forward and backward, {length} tokens", seconds["plain"] / 3, "CPU s")
        for name in transforms:
            row(f"step of {name} / that", seconds[name] / seconds["plain"], "", bounds[name, length])


@torch.no_grad()
def online() -> None:
    """CPU seconds of the NVFP4 W4A4 forward with online codecs over those without. The weights' values do not matter."""
    torch.set_num_threads(1)
    model, tokens = load()
    cut = windows(tokens["evaluation"], EVALUATION[1], 2)
    subject, context = subject_of(model, cut)
    adapter, act = subject.adapter, nvfp4().act.dynamic()
    inputs = [m.site for m in adapter.model.modules() if isinstance(m, QuantLinear)]
    for site in inputs:
        site.format = act
    widths = context.widths
    hadamard = build(own_settings("hadamard"), "transform").fit(context, subject)
    encoders = {(None, site): Blocks(torch.randn(n // 64, 64, 64)) for site, n in widths.items()}
    r4 = {(None, "down_in"): build(own_settings("quarot"), "transform").draw(context, widths["down_in"], "R4")}
    dense = {(None, site): Blocks(torch.randn(1, n, n)) for site, n in widths.items()}
    variants = {"none": {}, "Hadamard blocks of 64 at every site": hadamard.online, "QuaRot's R4": r4,
                "block encoders of 64 at every site": encoders, "PCA, dense at every site": dense}
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
    for name, value in seconds.items():
        bound = "reported" if "PCA" in name else "at most 1.15 (Hadamard and encoders together)"
        row(f"with {name}", value / plain, "", bound)


def own_settings(name: str) -> dict:
    """The constructor's part of an option of conf/transform."""
    return {k: v for k, v in option("transform", name).items() if k not in ("name", "smooth", "save", "load")}


PARTS = {"evaluation": evaluation, "gptq": gptq, "memory": memory, "learning": learning, "online": online}

if __name__ == "__main__":
    if sys.argv[1:2] == ["_peak"]:
        _peak(sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of {', '.join(PARTS)}")
        for part in parser.parse_args().parts:
            PARTS[part]()
