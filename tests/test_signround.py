"""SignRound and its form for intervals: they start at rounding to nearest, learn by the published
gradients, and never leave a weight's two neighbours."""

import math

import pytest
import torch
from composed import small
from test_adascale import OneLayer, draw

from harness.config.errors import ConfigError
from harness.formats import FP4, MX, NVFP4, FourOverSix, Integer
from harness.pipeline.job import execute
from harness.solvers import RTN, Problem, SignRound
from harness.solvers.intervals import Interval, Offset
from harness.solvers.learning import distance
from harness.solvers.neighbours import around

GROUP = {"granularity": "group", "group_size": 32}
FORMATS = {
    "int4_channel": Integer(bits=4),
    "int4_tensor": Integer(bits=4, granularity="tensor"),
    "int4_group": Integer(bits=4, **GROUP),
    "int4_mse": Integer(bits=4, observer="mse", **GROUP),
    "int4_asymmetric": Integer(bits=4, symmetric=False, **GROUP),
    "int4_offset": Integer(bits=4, symmetric=False, zp="float_offset", **GROUP),
    "int3_narrow": Integer(bits=3, int_range="narrow"),
    "int8": Integer(bits=8),
    "fp4": FP4(),
    "nvfp4": NVFP4(),
    "nvfp4_mse": NVFP4(observer="mse"),
    "fouroversix": FourOverSix(),
    "mxfp4": MX(),
    "mxfp6": MX(bits=6, element="e3m2"),
    "mxfp8": MX(bits=8, element="e4m3"),
    "e5m2": MX(bits=8, element="e5m2"),
    "padded": NVFP4(pad="zero"),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def started(name, weight):
    format = FORMATS[name]
    return weight, format, RTN().static_scales(Problem({"w": weight}, {"w": format}))["w"]


def hostile(name):
    """A weight with a row of zeros, a tiny row, one of lattice points, and an odd width to pad."""
    weight = draw(24, 70 if name == "padded" else 64)
    weight[3] = 0
    weight[4] *= 1e-9
    weight[5] = torch.arange(weight.shape[1]) % 7 - 3
    return weight


def moved(module, seed=0):
    """The module with v in [-1/2, 1/2] (of an interval: [-2, 2]) and ratios in [.6, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.v.copy_(torch.rand(module.v.shape, generator=generator) - 0.5)
        if isinstance(module, Interval):
            module.v.mul_(4)
        elif module.shrunk.requires_grad:
            module.shrunk.copy_(0.4 * torch.rand(module.shrunk.shape, generator=generator))
    return module


def points(format, scales, blocks):
    """Every lattice point of each element, [codes, *blocks], by decoding every code."""
    codes = torch.arange(2**format.bits)
    if isinstance(format, Integer):
        codes = torch.arange(format.qmin, format.qmax + 1)
    width = format.join(blocks, torch.Size([*blocks.shape[:-2], blocks[0].numel()])).shape
    rows = [format.split(format.decode(code.expand(width), scales)) for code in codes.unbind()]
    return torch.stack(rows)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int4_tensor"])
def test_neighbours_are_those_among_all_codes(name):
    weight, format, scales = started(name, hostile(name))
    place = around(weight, format, scales)
    x, lo, hi = place.blocks, place.lo, place.hi
    lattice = points(format, scales, x).nan_to_num(math.inf, math.inf, -math.inf)
    least = torch.where(lattice.isfinite(), lattice, math.inf).amin(0)
    greatest = torch.where(lattice.isfinite(), lattice, -math.inf).amax(0)
    assert torch.equal(place.least.expand_as(x), least)
    assert torch.equal(place.greatest.expand_as(x), greatest)
    between = (lattice > lo) & (lattice < hi)
    assert not between.any(), "no point lies between two neighbours"
    assert (lattice == lo).any(0).all() and (lattice == hi).any(0).all()
    assert ((lo < hi) | (least == greatest)).all()
    within = (x >= least) & (x <= greatest)
    assert (within & (x > lo.min())).any()
    assert ((lo <= x) & (x <= hi) | ~within).all()
    assert ((hi == greatest) | (x <= greatest)).all() and ((lo == least) | (x >= least)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_start_is_rounding_to_nearest_bit_for_bit(name, dtype):
    weight, format, scales = started(name, hostile(name).to(dtype))
    want = format.quantize(weight, scales=scales)
    for module in (Offset(weight, format, scales, True), Interval(weight, format, scales)):
        got = module.qtensor()
        assert torch.equal(got.dequantize(), want.dequantize())
        for key, value in want.scales.tensors().items():
            assert torch.equal(got.scales.tensors()[key].float(), value.float())
    assert torch.equal(Offset(weight, format, scales, True)(0.0), want.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_learned_a_weight_goes_to_a_neighbour(name):
    weight, format, scales = started(name, draw(24, 70 if name == "padded" else 64))
    place = around(weight, format, scales)
    lo, hi = (format.join(t, weight.shape) for t in (place.lo, place.hi))
    nearest = format.quantize(weight, scales=scales).dequantize()
    for module in (Offset(weight, format, scales, False), Interval(weight, format, scales)):
        value = moved(module).qtensor().dequantize()
        assert ((value == lo) | (value == hi)).all()
        assert (value != nearest).any()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_was_trained(name):
    weight, format, scales = started(name, draw(24, 70 if name == "padded" else 64))
    offset = moved(Offset(weight, format, scales, True))
    assert torch.equal(offset(0.5), offset.qtensor().dequantize())
    interval = moved(Interval(weight, format, scales))
    place = around(weight, format, scales)
    lo, hi = (format.join(t, weight.shape) for t in (place.lo, place.hi))
    last = interval(1.0)
    arrived = (last == lo) | (last == hi)
    assert arrived.float().mean() > 0.9, "nearly all have been pushed to a neighbour"
    assert torch.equal(last[arrived], interval.qtensor().dequantize()[arrived])


@pytest.mark.parametrize("far", [-20.0, 20.0])
@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_beyond_the_lattice_is_stored_as_it_was_trained(name, far):
    weight, format, scales = started(name, draw(24, 70 if name == "padded" else 64))
    interval = Interval(2 * weight, format, scales)
    with torch.no_grad():
        interval.v.fill_(far)
    assert torch.equal(interval(1.0), interval.qtensor().dequantize())


def straight(x, value):
    return x + (value - x).detach()


def published(weight, v, a, b, first, last, levels):
    """SignRound of asymmetric integers (arXiv 2309.05516): s, z, q and what they stand for."""
    s = (b * last - a * first) / levels
    z = straight(-a * first / s, (-a * first / s).round())
    x = weight / s + v
    q = torch.clamp(straight(x, x.round()) + z, 0, levels)
    return s * (q - z)


@pytest.mark.parametrize("name", ["int4_asymmetric", "int4_channel", "int3_narrow"])
def test_the_gradient_of_integers_is_the_published_one(name):
    """Against autograd in float64 through the straight-through estimator and torch.clamp."""
    weight, format, scales = started(name, draw(12, 64))
    module = moved(Offset(weight, format, scales, True))
    upstream = draw(12, 64, seed=3)
    (module(0.0) * upstream).sum().backward()
    w, g = (format.split(t.double()) for t in (weight, upstream))
    s = scales.scale.double().unsqueeze(-1)
    v = format.split(module.v.detach().double()).requires_grad_()
    ratios = (1 - module.shrunk.detach().double()).unsqueeze(-1).requires_grad_()
    if format.symmetric:
        x = w / (ratios[0] * s) + v
        value = ratios[0] * s * torch.clamp(straight(x, x.round()), *format.reach)
        clamped = (x.round() < format.qmin) | (x.round() > format.qmax)
    else:
        z = scales.zero.double().unsqueeze(-1)
        first, last = -z * s, (15 - z) * s
        value = published(w, v, ratios[0], ratios[1], first, last, 15)
        clamped = (value <= (ratios[0] * first)) | (value >= ratios[1] * last)
    assert clamped.any() and not clamped.all()
    assert torch.allclose(format.join(value, weight.shape), module(0.0).double(), atol=1e-6)
    (value * g).sum().backward()
    assert torch.allclose(format.split(module.v.grad).double(), v.grad, rtol=1e-5, atol=1e-9)
    assert torch.allclose(module.shrunk.grad.double(), -ratios.grad[..., 0], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_floats_is_scaled_by_the_interval():
    """E2M1 in float64: x + v (hi - lo) to the nearer of its neighbours, straight through."""
    weight, format, scales = started("fp4", draw(12, 64))
    module = moved(Offset(weight, format, scales, True))
    upstream = draw(12, 64, seed=3)
    (module(0.0) * upstream).sum().backward()
    w, g = (format.split(t.double()) for t in (weight, upstream))
    v = format.split(module.v.detach().double()).requires_grad_()
    ratio = (1 - module.shrunk[0].detach().double()).unsqueeze(-1).requires_grad_()
    s = ratio * scales.scale.double().unsqueeze(-1)
    grid = torch.cat([-E2M1[1:].flip(0), E2M1])
    above = torch.searchsorted(grid, (w / s).detach(), right=True).clamp(1, len(grid) - 1)
    lo, hi = grid[above - 1], grid[above]
    y = w / s + v * (hi - lo)
    value = s * straight(y.clamp(-6, 6), torch.where(y > (lo + hi) / 2, hi, lo))
    assert {0.5, 1.0, 2.0} == set((hi - lo).unique().tolist())
    (value * g).sum().backward()
    assert torch.allclose(format.join(value, weight.shape), module(0.0).double(), atol=1e-6)
    assert torch.allclose(format.split(module.v.grad).double(), v.grad, rtol=1e-5, atol=1e-9)
    want = -ratio.grad.squeeze(-1)
    assert torch.allclose(module.shrunk.grad[0].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int4_channel", "fp4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_an_interval_is_a_rectified_sigmoid_between_two_neighbours(name, progress):
    weight, format, scales = started(name, draw(12, 64))
    place = around(weight, format, scales)
    lo, hi, w = (t.double() for t in (place.lo, place.hi, place.blocks))
    module = Interval(weight, format, scales)
    inside = (w >= lo) & (w <= hi)
    free = format.split(module(0.0)).double()
    assert torch.allclose(free[inside], w[inside], atol=1e-6), "it starts at the float weight"
    upstream = draw(12, 64, seed=3)
    (moved(module)(progress) * upstream).sum().backward()
    t = ((w - lo) / (hi - lo)).clamp(0, 1)
    odds = (t + 0.1) / 1.2  # AdaRound's stretch from -.1 to 1.1
    u = (odds / (1 - odds)).log() + format.split(module.v.detach().double())
    sigmoid = 1 / (1 + torch.exp(-u))
    k = 1.2 * 1000**progress
    h = k * (sigmoid - 0.5) + 0.5
    want = (hi - lo) * k * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1)).double()
    want *= format.split(upstream.double())
    assert torch.allclose(format.split(module.v.grad).double(), want, rtol=1e-3, atol=1e-5)
    value = lo + h.clamp(0, 1) * (hi - lo)
    assert torch.allclose(format.split(module(progress)).double(), value, atol=1e-5)
    assert (want != 0).any() and (want == 0).any()


@pytest.mark.parametrize("name", ["int4_asymmetric", "int4_offset"])
def test_both_ends_of_a_range_with_a_zero_point_move(name):
    weight, format, scales = started(name, draw(12, 64))
    a, b = (0.5 + 0.5 * draw(12, 2, seed=seed).sigmoid() for seed in (1, 2))
    before = around(weight, format, scales)
    after = around(weight, format, format.clipped(scales, a, b))
    step = (after.greatest - after.least) / 15
    for ratio, old, new in (
        (a, before.least, after.least),
        (b, before.greatest, after.greatest),
    ):
        # a zero point that is a code is rounded to one
        assert ((new - ratio.unsqueeze(-1) * old).abs() <= 0.501 * step).all()
    same = format.clipped(scales, torch.ones_like(a), torch.ones_like(b))
    assert torch.equal(same.scale, scales.scale) and torch.equal(same.zero, scales.zero)


def rtn(block):
    weights = {}
    for linears in block.sites.values():
        chosen = {name: block.weights[name] for name in linears}
        formats = {name: block.formats[name] for name in linears}
        weights |= RTN().solve(Problem(chosen, formats)).qtensors
    return weights


FORMS = {"offset": {}, "offset_only": {"clip": False}, "interval": {"rounding": "interval"}}
FORMS["interval"]["clip"] = False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "padded"])
def test_the_loss_falls_on_windows_it_was_not_fitted_to(name, form):
    block = OneLayer(FORMATS[name])
    solution = SignRound(steps=24, **FORMS[form]).solve_block(block)
    index = len(block.quantized) - 1

    def measured(qtensors):
        weights = {n: q.dequantize() for n, q in qtensors.items()}
        hidden = block.quantized[index]
        return distance(block.forward(index, hidden, weights), block.targets[index]).item()

    before, after = (solution.report[f"loss_{when}"] for when in ("before", "after"))
    assert before == pytest.approx(measured(rtn(block)), rel=1e-6)
    assert after == pytest.approx(measured(solution.qtensors), rel=1e-6), "what was kept is given"
    if FORMATS[name].bits == 4:
        assert after < before


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_helps_it_is_rounding_to_nearest(form):
    block = OneLayer(FORMATS["int4_group"])
    plain = rtn(block)
    weights = {name: q.dequantize() for name, q in plain.items()}
    block.targets = [block.forward(i, x, weights) for i, x in enumerate(block.quantized)]
    solver = SignRound(steps=5, **FORMS[form])
    solution = solver.solve_block(block)
    assert solution.report["best_step"] == 0
    for name, q in solution.qtensors.items():
        assert torch.equal(q.codes, plain[name].codes)
    assert "rtn" in solver.idle([solution.report])[0]


def test_steps_are_signs_of_the_gradient_with_a_rate_that_falls_to_zero():
    """The published loop for one linear without ratios, in float64."""
    block = OneLayer(Integer(bits=4))
    block.weights = {"a": block.weights["a"]}
    block.formats = {"a": block.formats["a"]}
    block.sites = {"in": ("a",)}
    block.forward = lambda index, hidden, weights: hidden @ weights["a"].to(hidden).T
    few = torch.arange(1.0, 65).pow(-1).diag()  # directions carry most: features are correlated
    mix = draw(64, 64, seed=7) @ few @ draw(64, 64, seed=8)
    block.quantized = [x @ mix for x in block.quantized]
    block.targets = [block.forward(i, x, block.weights) for i, x in enumerate(block.quantized)]
    steps = 24
    solution = SignRound(steps=steps, clip=False).solve_block(block)
    assert solution.report["best_step"] == steps, "the last iterate is compared with"
    weight = block.weights["a"].double()
    s = weight.abs().amax(1, keepdim=True) / 7
    v = torch.zeros_like(weight, requires_grad=True)
    for step in range(steps):
        x, y = (t[step % 7].double() for t in (block.quantized, block.targets))
        q = weight / s + v
        value = s * torch.clamp(straight(q, q.round()), -8, 7)
        (gradient,) = torch.autograd.grad((x @ value.T - y).square().sum(), v)
        with torch.no_grad():
            v -= (1 - step / steps) / steps * gradient.sign()
            v.clamp_(-0.5, 0.5)
    codes = torch.clamp((weight / s + v).round(), -8, 7)
    same = (solution.qtensors["a"].codes == codes).float().mean()
    assert same > 0.99, "but for ties and signs of gradients near 0"
    assert (codes != (weight / s).round()).float().mean() > 0.05, "it is not rtn"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rounding": "up"}, r"solver\.rounding=up"),
        ({"rounding": "interval"}, r"solver\.clip=true.*solver\.clip=false"),
        ({"steps": -1}, r"solver\.steps=-1"),
        ({"batch": 0}, r"solver\.batch=0"),
        ({"lr": -1.0}, r"solver\.lr=-1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        SignRound(**settings)


@pytest.mark.parametrize("solver", ["signround", "faar"])
def test_killed_and_resumed_is_the_same_bits(tmp_path, monkeypatch, solver):
    settings = [f"solver={solver}", "solver.steps=6", "solver.batch=1", "format=nvfp4"]
    whole = execute(*small(tmp_path / "whole", *settings))
    cfg, choices = small(tmp_path / "halves", *settings)
    learned, solve = [], SignRound.solve_block

    def killed(self, block):
        if block.index == 1 and len(learned) == 1:
            learned.append("killed")
            raise KeyboardInterrupt
        learned.append(block.index)
        return solve(self, block)

    monkeypatch.setattr(SignRound, "solve_block", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(cfg, choices)
    resumed = execute(cfg, choices)
    assert learned == [0, "killed", 1], "the first block is not solved again"
    for index in range(2):
        assert resumed.run.block(index).read_bytes() == whole.run.block(index).read_bytes()
    assert resumed.metrics["stages"] == whole.metrics["stages"]


@pytest.mark.parametrize("solver", ["signround", "adascale"])
def test_a_block_without_any_weight_to_quantize_is_passed_by(tmp_path, solver):
    short = [f"solver={solver}", f"solver.{'steps' if solver == 'signround' else 'iterations'}=2"]
    outcome = execute(*small(tmp_path, *short, "format.overrides={first_1: 16}"))
    assert outcome.status == "done", outcome.error
    best = [layer.get("best_step") for layer in outcome.metrics["layers"]]
    assert None in best and any(step is not None for step in best)
