"""What the bench times is what the harness does."""

import copy
import time

import bench
import bench_gpu
import torch
from bench_models import nvfp4, quantized

from harness.evaluation.perplexity import window_losses
from harness.formats import NVFP4
from harness.models.quant_linear import QuantLinear
from harness.models.tiny import Tiny
from harness.solvers import GPTQ, RTN


def test_every_part_that_the_bench_names_is_there():
    """What it imports of the harness, too: nothing else in the suite does."""
    assert all(map(callable, bench.PARTS.values()))
    assert all(part in bench.__doc__ for part in bench.PARTS)


def test_the_bench_quantizes_every_linear_it_times():
    model, _ = Tiny().load()
    before = copy.deepcopy(dict(model.named_parameters()))
    scheme = nvfp4()
    adapter = quantized(
        model,
        scheme,
        RTN(),
        torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0)),
    )
    linears = {
        name: module
        for name, module in adapter.model.named_modules()
        if isinstance(module, QuantLinear)
    }
    assert len(linears) == 7 * len(adapter.blocks)
    for name, linear in linears.items():
        assert linear.site.format is scheme.act
        assert not torch.equal(linear.weight, before[f"{name}.weight"])
        magnitudes = linear.weight.unflatten(-1, (-1, 16)).abs().sort(-1).values
        assert int((magnitudes.diff(dim=-1) > 0).sum(-1).max()) < 8, (
            name
        )  # a block holds E2M1's eight magnitudes at most


def test_a_second_is_a_second():
    began = time.perf_counter()
    found = bench_gpu.seconds(lambda: time.sleep(0.02), torch.device("cpu"))
    assert 0.02 <= found <= time.perf_counter() - began


def test_what_is_measured_on_a_gpu_is_what_its_rows_say(monkeypatch):
    """Forwards of the evaluation's windows, once before the clock runs and once while it does, in
    floats and with activations in NVFP4; GPTQ of the calibration's windows."""
    read, solved = [], []

    def losses(adapter, ids):
        sites = [m.site for m in adapter.model.modules() if isinstance(m, QuantLinear)]
        read.append((ids.shape, {type(site.format) for site in sites}))
        return window_losses(adapter, ids)

    def solving(model, scheme, solver, text):
        solved.append((type(solver), text.shape))
        return quantized(model, scheme, solver, text)

    def counted(do, device):
        do()
        return len(read), len(solved)

    monkeypatch.setattr(bench_gpu, "window_losses", losses)
    monkeypatch.setattr(bench_gpu, "quantized", solving)
    monkeypatch.setattr(bench_gpu, "seconds", counted)
    widths = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    found = bench_gpu.measured(widths, torch.device("cpu"), (4, 32), (3, 16))
    assert found == {"bfloat16": (6, 1), "NVFP4 W4A4": (12, 1), "GPTQ": (12, 2)}
    assert read == [((1, 16), set())] * 6 + [((1, 16), {NVFP4})] * 6
    assert solved == [(RTN, (1, 32)), (GPTQ, (4, 32))]
