"""Bench parts around the solvers: where GPTQ's time goes, an iteration of AdaScale, memory of small
and of large models."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_models import CALIBRATION, load, nvfp4, quantized, row
from torch.func import functional_call

from harness.calibration.shipped import Pydoc
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.windows import tokenize, windows
from harness.config.build import build, option
from harness.formats import Integer, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.source import ModelSource
from harness.solvers import GPTQ, Problem, Solver
from harness.solvers.adascale import Rounding
from harness.solvers.columns import Columns, StaticLattice
from harness.solvers.inverses import Begun, inverses
from harness.solvers.learning import distance
from harness.solvers.minmax import minmax
from harness.solvers.propagation import compensated
from harness.solvers.search import under_hessian


@torch.no_grad()
def gptq() -> None:
    """CPU seconds of each part of GPTQ on the embedded model, beside what that part cannot do
    without."""
    torch.set_num_threads(1)
    model, tokens = load()
    calibration = windows(tokens["calibration"], CALIBRATION[1], CALIBRATION[0])
    adapter = Adapter(model)
    parts = {"forwards": _forwards(adapter, calibration)}
    for site in adapter.sites(0):
        rows = sum(linear.out_features for linear in adapter.linears(0, site).values())
        for name, seconds in _site(adapter.width(site), rows, len(calibration) // 4).items():
            so_far = parts.get(name, (0.0, 0.0))
            parts[name] = tuple(a + b * len(adapter.blocks) for a, b in zip(so_far, seconds))
    total = _seconds(model, nvfp4(), GPTQ(), calibration)
    more = {name: parts.pop(name) for name in ("scales under H", "propagated errors")}
    for name, (ours, floor) in parts.items():
        row(f"GPTQ, {name}: {ours:.1f} CPU s, floor {floor:.1f}", ours / total, "of all")
    row(
        "NVFP4 W4A4 GPTQ, all blocks",
        total,
        "CPU s",
        "FP-Quant 319, llm-compressor 189 (elsewhere)",
    )
    row("ratio to the floor", total / sum(floor for _, floor in parts.values()), "", "at most 1.6")
    for name, (ours, floor) in more.items():
        row(f"{name}: {ours:.1f} CPU s, floor {floor:.1f}", ours / total, "of GPTQ")
    searched = replace(nvfp4(), weight=replace(nvfp4().weight, observer="hessian"))
    with_scales = _seconds(load()[0], searched, GPTQ(), calibration)
    row("scales under H, all they cost", with_scales / total - 1, "of GPTQ", "at most .35")
    qep = GPTQ(propagate="qep", stream="both", hessian_input="quantized")
    with_both = _seconds(load()[0], searched, qep, calibration)
    row("propagated errors, the same", (with_both - with_scales) / total, "of GPTQ", "at most .6")


def _seconds(model, scheme: Scheme, solver: Solver, calibration) -> float:
    """CPU seconds of quantizing the model."""
    start = time.process_time()
    quantized(model, scheme, solver, calibration)
    return time.process_time() - start


def _forwards(adapter: Adapter, calibration) -> tuple[float, float]:
    """Ours walks branch by branch and keeps what it needs; the floor is the model's own forward."""
    start = time.process_time()
    for batch in calibration.split(4):
        adapter.backbone(input_ids=batch, use_cache=False)
    floor = time.process_time() - start
    start = time.process_time()
    stream = Stream(adapter, calibration)
    for block in adapter.blocks:
        stream.advance(block)
    return time.process_time() - start, floor


def _site(width: int, rows: int, batches: int) -> dict[str, tuple[float, float]]:
    """{part: (ours, floor)} for one site of one block, NVFP4 weights [rows, width]."""
    x, weight, format, clock = (
        torch.randn(2048, width),
        torch.randn(rows, width),
        nvfp4().weight,
        time.process_time,
    )
    start = clock()
    statistics = Statistics(width, 2048 * batches, x.device, curvature=width)
    for _ in range(batches):
        statistics.add(x)
    statistics.finish()
    hessians = clock() - start
    start, h = clock(), torch.zeros(width, width)
    for _ in range(batches):
        h.addmm_(x.T, x)
    hessians = hessians, clock() - start

    order, dead, start = torch.arange(width), torch.zeros(width, dtype=torch.bool), clock()
    begun = Begun(Problem({}, {}), statistics.hessian, dead, order, False, {})
    (unit,), _ = inverses([begun], GPTQ().damp, torch.float32)
    factorization = clock() - start
    start = clock()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    factorization = factorization, clock() - start

    problem, start = Problem({"w": weight}, {"w": format}), clock()
    scales = GPTQ().static_scales(problem)
    work = weight.T.contiguous()
    rounded = torch.empty_like(work)
    lattice = StaticLattice(problem, ["w"], [rows], scales, [16], [order])
    Columns(work, rounded, unit, lattice, 32).solve(0, width)
    updates, work, start = clock() - start, weight.T.contiguous(), clock()
    bare_updates(u, work)
    updates = updates, clock() - start

    start = clock()
    format.quantize(rounded.T.contiguous(), scales=scales["w"]).state()
    packing, start = clock() - start, clock()
    codes = weight.to(torch.uint8)
    (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()
    packing = packing, clock() - start
    found = replace(format, observer="hessian")
    start = clock()
    under_hessian(weight, found, scales["w"], statistics.hessian)
    searched, start = clock() - start, clock()
    blocks = weight.view(rows, -1, 16).transpose(0, 1)
    for _ in range(15):  # a product with its block of H of every candidate's error
        (blocks @ h[:16, :16]).mul_(blocks).sum(-1)
    searched = searched, clock() - start

    drifting = Statistics(width, 2048 * batches, x.device, curvature=0)
    start = clock()
    for _ in range(batches):
        drifting.add(x, untouched=x)
    drift = statistics.hessian * 0.01
    compensated(Problem({"w": weight}, {}, statistics.hessian, drift=drift), 0.5, 1.0)
    propagated = clock() - start, hessians[1]  # one more moment, not symmetric
    return {
        "scales under H": searched,
        "propagated errors": propagated,
        "Hessians": hessians,
        "factorization": factorization,
        "updates": updates,
        "packing": packing,
    }


def bare_updates(u: torch.Tensor, w: torch.Tensor, block: int = 32) -> None:
    """What no GPTQ can do without: the error feedback into w [in, rows], without any rounding."""
    for lo in range(0, len(w), block):
        hi = lo + block
        for i in range(lo, hi):
            w[i + 1 : hi].addmm_(u[i, i + 1 : hi, None], w[i, None], alpha=-1)
        w[hi:].addmm_(u[lo:hi, hi:].T, w[lo:hi], alpha=-1)


def adascale() -> None:
    """CPU seconds of one AdaScale iteration of a block against forward, backward and Adam of its
    own weights."""
    torch.set_num_threads(1)
    model, tokens = load()
    adapter = Adapter(model)
    swap(adapter)
    with torch.no_grad():
        stream = Stream(adapter, windows(tokens["calibration"], 2048, 1))
        block, hidden, context = (
            adapter.blocks[0],
            stream.hidden[0],
            stream.block_kwargs[adapter.blocks[0]][0],
        )
        target = block(hidden, **context)
    linears = {
        name: block.get_submodule(name) for site in adapter.sites(0) for name in site.linears
    }
    plain = {name: torch.nn.Parameter(linear.weight.clone()) for name, linear in linears.items()}
    format = minmax(Integer(bits=4, granularity="channel"))
    learned = {
        name: Rounding(linear.weight, format, format.scales(linear.weight))
        for name, linear in linears.items()
    }
    own = [p for rounding in learned.values() for p in rounding.clip() + rounding.shape()]
    adams = [
        torch.optim.Adam(parameters, lr=0.0, fused=True)
        for parameters in (list(plain.values()), own)
    ]

    def step(adam, weights) -> float:
        start = time.process_time()
        replaced = {
            f"{name}.weight": weight() if isinstance(weight, Rounding) else weight
            for name, weight in weights.items()
        }
        adam.zero_grad()
        distance(functional_call(block, replaced, (hidden,), context), target).backward()
        adam.step()
        return time.process_time() - start

    seconds = [0.0, 0.0]
    for repeat in range(6):
        for side, (adam, weights) in enumerate(zip(adams, (plain, learned))):
            elapsed = step(adam, weights)
            seconds[side] += elapsed if repeat else 0.0
    row("forward, backward and Adam of a block, 2048 tokens", seconds[0] / 5, "CPU s")
    row("iteration of adascale / that", seconds[1] / seconds[0], "", "at most 1.4")


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load()
        model.save_pretrained(folder)
        del model
        # the allocator as a user finds it: one told to keep everything would only show how much it
        # kept
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        line = [sys.executable, __file__, "_peak", folder]
        output = subprocess.run(line, check=True, capture_output=True, text=True, env=env).stdout
    libraries, weights, block, activations, hessians, peak = map(float, output.split()[-6:])
    for name, value in (
        ("model", weights),
        ("block", block),
        ("activations", activations),
        ("3 Hessians", hessians),
    ):
        row(f"memory held: {name}", value, "MB")
    row("importing the libraries", libraries, "MB")
    row("peak resident while quantizing", peak, "MB")
    row(
        "(peak - libraries) / held",
        (peak - libraries) / (weights + block + activations + hessians),
        "",
        "at most 1.25",
    )


def _peak(folder: str) -> None:
    """In a process of its own: quantize, print the parts and the peak in MB."""
    import transformers

    torch.set_num_threads(1)
    tiny, tokenizer = build(option("model", "tiny"), "model", ModelSource).load()
    tokens = tokenize(tokenizer, Pydoc().text("calibration"))
    quantized(
        tiny, nvfp4(), GPTQ(), windows(tokens, 64, 2)
    )  # a small run, so that all that is imported late is here
    libraries = _resident("VmRSS")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter = Adapter(model)
    calibration = windows(tokens, CALIBRATION[1], CALIBRATION[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    block = sum(p.numel() * p.element_size() for p in adapter.blocks[0].parameters()) / 2**20
    activations = calibration.numel() * model.config.hidden_size * 4 / 2**20
    hessians = 3 * max(adapter.width(s) for s in adapter.sites(0)) ** 2 * 4 / 2**20
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # loading is not what is measured: forget its peak
    quantized(model, nvfp4(), GPTQ(), calibration)
    print(libraries, weights, block, activations, hessians, _resident("VmHWM"))


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    _peak(sys.argv[2])
