"""What the bench times is what the harness does."""

import copy

import bench
import torch
from bench_gpu import measured
from bench_models import nvfp4, quantized

from harness.models.quant_linear import QuantLinear
from harness.models.tiny import Tiny
from harness.solvers import RTN


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


def test_what_is_measured_on_a_gpu_runs():
    widths = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    found = measured(widths, torch.device("cpu"), (4, 32), (1, 32))
    assert set(found) == {"bfloat16", "NVFP4 W4A4", "GPTQ"}
    assert min(found.values()) > 0
