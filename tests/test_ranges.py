"""Ranges that are learned: gradients pass what is quantized and reach its range, and the clips that
come of it go into formats and files."""

import json

import pytest
import torch
from affine_parts import F64, INT4, NV, TOKEN, close, normal

from harness.codecs.packing import pack, unpack
from harness.codecs.placement import Placement
from harness.config.errors import DataError
from harness.formats import MX, NVFP4, Integer
from harness.models.ranged import Ranged


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def symmetric(x, c):
    """INT4 a row, written out: s = c max|x| / 7."""
    s = c * x.abs().amax(-1, keepdim=True) / 7
    return s * _Round.apply((x / s).clamp(-8, 7))


def asymmetric(x, c):
    """INT4 a row with a zero point, which no gradient moves."""
    low, high = c * x.amin(-1, keepdim=True), c * x.amax(-1, keepdim=True)
    s = (high - low) / 15
    z = (-low / s).round().detach()
    return s * (_Round.apply((x / s).clamp(-z.double(), 15 - z)))


@pytest.mark.parametrize("rule, format", [
    (symmetric, Integer(role="activation", granularity="token")),
    (asymmetric, TOKEN),
])  # fmt: skip
def test_gradients_of_what_is_quantized_and_of_its_range(rule, format):
    x = normal(6, 32).float().double().requires_grad_()
    c = torch.tensor(0.7, dtype=F64, requires_grad=True)
    upstream = normal(6, 32, seed=1)
    wanted = torch.autograd.grad((rule(x, c) * upstream).sum(), (x, c))
    near = x.detach().float().requires_grad_()
    ratio = torch.tensor(0.7, requires_grad=True)
    value = Ranged(format, ratio).fake(near)
    close(value.detach().double(), rule(x, c).detach(), 1e-5)
    found = torch.autograd.grad((value * upstream.float()).sum(), (near, ratio))
    for a, b in zip(found, wanted):
        close(a.double(), b, 1e-4)


@pytest.mark.parametrize("format", [NVFP4(role="activation", global_scale="none"),
                                    MX(role="activation")])  # fmt: skip
def test_a_smaller_peak_makes_a_smaller_error_of_floats_too(format):
    """d s = s d log peak, whatever the scale is rounded to."""
    x = normal(4, 64).float().requires_grad_()
    upstream = normal(4, 64, seed=1).float()
    value = Ranged(format).fake(x)
    assert torch.equal(value.detach(), format.fake(x.detach()))
    (found,) = torch.autograd.grad((value * upstream).sum(), x)
    blocks, values, up = (format.split(t.detach().double()) for t in (x, value, upstream))
    (scale,) = format.lattice(format.scales(x.detach()))
    inside = blocks.abs() <= 6 * scale[..., None]
    wanted = up * inside
    peak = blocks.abs().argmax(-1, keepdim=True)
    slope = (up * (values - inside * blocks)).sum(-1, keepdim=True)
    wanted.scatter_add_(-1, peak, slope / blocks.gather(-1, peak))
    close(format.split(found).double(), wanted, 1e-5)


@pytest.mark.parametrize("format", [TOKEN, Integer(role="activation", granularity="token"),
                                    NVFP4(role="activation"), MX(role="activation")])  # fmt: skip
def test_values_are_the_formats_in_every_bit(format):
    x = normal(8, 64).float()
    wanted = format.fake(x)
    assert torch.equal(Ranged(format).fake(x.clone().requires_grad_()), wanted)
    assert torch.equal(Ranged(format).fake(x, ste=False), wanted)


def test_a_ratio_finds_the_range_of_least_error():
    """Against a search; a straight-through gradient knows nothing of ranges."""
    format = Integer(role="activation", granularity="token")
    x = (normal(64, 256) ** 3).float()

    def error(c):
        return (Ranged(format, c).fake(x) - x).square().mean()

    grid = {i / 100: float(error(torch.tensor(i / 100))) for i in range(20, 101)}
    c = torch.tensor(1.0, requires_grad=True)
    adam = torch.optim.Adam([c], lr=0.02)
    for _ in range(100):
        adam.zero_grad()
        error(c).backward()
        adam.step()
    assert float(error(c.detach())) < 1.02 * min(grid.values()) < 0.9 * grid[1.0]


def test_clips_go_into_integer_formats_and_no_others():
    clips = {(0, "q"): {"act": 0.9, "weight": 0.5}, (1, "q"): {"weight": 0.8}}
    found = INT4.clipped(clips)
    assert found.part("act", 0, "q").clip == 0.9 and found.part("weight", 0, "q").clip == 0.5
    assert found.part("act", 1, "q") == TOKEN and found.part("weight", 1, "q").clip == 0.8
    assert found.part("weight", 0, "k") == INT4.weight
    assert NV.clipped(clips) == NV
    assert INT4.clipped(clips, ("act",)).part("weight", 0, "q") == INT4.weight
    assert found.clipped(clips).part("weight", 0, "q").clip == 0.25


def test_clips_are_kept_with_the_matrices():
    clips = {(0, "mlp.up_proj"): {"act": 0.75}}
    spec = pack(Placement(clips=clips), {})
    assert unpack(json.loads(json.dumps(spec)), {}).clips == clips
    assert "clips" not in pack(Placement(), {})
    for ratio in (1.5, 0, "1", True):
        spec["clips"] = [[0, "mlp.up_proj", {"act": ratio}]]
        with pytest.raises(DataError, match="clips needs"):
            unpack(spec, {})
