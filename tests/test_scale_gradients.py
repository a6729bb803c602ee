"""Gradients of learned scales, against autograd and differences in float64: of one linear, whatever
its codes are, and of the whole model's divergence."""

import pytest
import torch
from preserved import exact_model, logits, token_ids
from tuners import draw, scaled, shift, solved

from harness.calibration.subject import StreamedModel
from harness.formats import FP4, Integer
from harness.models.merge import swap
from harness.transforms.learn import Teacher
from harness.tune import Student
from harness.tune.distill import made

F64 = torch.float64
# In the dtype of the weight throughout, with scales on no grid: what differences can be taken of.
SMOOTH = {
    "int4": Integer(granularity="group", group_size=16, compute_dtype="input", scale_dtype="input"),
    "int4_asymmetric": Integer(
        granularity="group",
        group_size=16,
        symmetric=False,
        compute_dtype="input",
        scale_dtype="input",
    ),
    "int4_offset": Integer(
        symmetric=False, zp="float_offset", compute_dtype="input", scale_dtype="input"
    ),
    "fp4": FP4(group_size=16, compute_dtype="input", scale_dtype="input"),
}


def lattice_of(format):
    """(values that codes stand for, in steps)."""
    if isinstance(format, FP4):
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=F64)
        return torch.cat([-positive.flip(0), positive])
    return torch.arange(format.qmin, format.qmax + 1, dtype=F64)


def lsq(format, weight, scale, zero):
    """LSQ's forward [rows, groups, group] by autograd alone: the nearest level of w / s, with the
    gradient of clamp, times s."""
    levels = lattice_of(format)
    offset = 0 if zero is None else zero.to(F64)[..., None]
    shifted = format.zp == "float_offset" if isinstance(format, Integer) else False
    x = (weight - offset if shifted else weight) / scale[..., None]
    code = x if shifted else x + offset
    nearest = levels[(code.detach()[..., None] - levels).abs().argmin(-1)]
    low, high = levels[0] - format.slack, levels[-1] + format.slack
    inside = (code >= low) & (code <= high)
    # rounded in value; what is clamped is a constant
    through = torch.where(inside, code + (nearest - code).detach(), nearest)
    return (
        (through * scale[..., None] + offset) if shifted else (through - offset) * scale[..., None]
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_rounded_codes_is_lsqs(name):
    format = SMOOTH[name]
    weight, q = solved(format, F64)
    module = shift(scaled(q, weight, "rounded"))
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    exponent = module.post.detach().clone().requires_grad_()
    blocks = format.split(weight)
    value = lsq(format, blocks, q.scales.scale * exponent.exp(), q.scales.zero)
    assert torch.allclose(format.join(value, weight.shape), module(), rtol=1e-12, atol=1e-14)
    value.backward(format.split(upstream))
    assert torch.allclose(module.post.grad, exponent.grad, rtol=1e-10, atol=1e-12)
    clamped = value.detach().abs() < 0.95 * blocks.abs()
    assert clamped.any() and not clamped.all(), "both branches of the rule were asked"


@pytest.mark.parametrize("name", SMOOTH)
def test_it_is_the_difference_of_the_loss_with_the_rounding_held(name):
    """w / s + (Q(w / s) - w / s) with the bracket a constant, by central differences."""
    format = SMOOTH[name]
    weight, q = solved(format, F64)
    module = shift(scaled(q, weight, "rounded"), size=0.05)
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    at = module.post.detach()
    blocks = format.split(weight)
    zero = torch.zeros_like(at) if q.scales.zero is None else q.scales.zero.to(F64)
    shifted = isinstance(format, Integer) and format.zp == "float_offset"
    offset, zero = (zero[..., None], 0) if shifted else (0, zero[..., None])

    def levels(exponent):
        return (blocks - offset) / (q.scales.scale * exponent.exp())[..., None] + zero

    step = (q.scales.scale * at.exp())[..., None]
    codes = (format.split(module().detach()) - offset) / step + zero
    held = codes - levels(at)
    points = lattice_of(format)
    clamped = (levels(at) < points[0] - format.slack) | (levels(at) > points[-1] + format.slack)

    def loss(exponent):
        code = torch.where(clamped, codes, levels(exponent) + held)
        value = (code - zero) * (q.scales.scale * exponent.exp())[..., None] + offset
        return (format.split(upstream) * value).sum(-1)

    h = 1e-6
    difference = (loss(at + h) - loss(at - h)) / (2 * h)
    assert torch.allclose(module.post.grad, difference, rtol=1e-6, atol=1e-8)
    assert clamped.any()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_of_fixed_codes_is_exact(name):
    format = SMOOTH[name]
    _, q = solved(format, F64)
    module = shift(scaled(q, None, "fixed"))
    upstream = draw(6, 64, seed=3, dtype=F64)
    module().backward(upstream)
    gradient = module.post.grad.clone()
    for index in range(min(5, gradient.numel())):
        values = []
        for h in (1e-6, -1e-6):
            module.post.data.view(-1)[index] += h
            values.append(float((module().detach() * upstream).sum()))
            module.post.data.view(-1)[index] -= h
        difference = (values[0] - values[1]) / 2e-6
        assert float(gradient.view(-1)[index]) == pytest.approx(difference, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_two_scales_share_the_gradient_of_one(name):
    """Where both are equal, those of decoding and of rounding add up to LSQ's."""
    weight, q = solved(SMOOTH[name], F64)
    one = shift(scaled(q, weight, "rounded"))
    two = scaled(q, weight, "dual")
    two.post.data.copy_(one.post.data)
    two.pre.data.copy_(one.post.data)
    upstream = draw(6, 64, seed=3, dtype=F64)
    for module in (one, two):
        module().backward(upstream)
    assert torch.equal(one(), two())
    assert torch.allclose(two.post.grad + two.pre.grad, one.post.grad, rtol=1e-10, atol=1e-12)
    assert two.pre.grad.abs().max() > 0.01


@pytest.mark.parametrize("codes", ["fixed", "dual"])
def test_the_gradient_of_the_divergence_is_its_difference(codes):
    """Through the whole model in float64, in one direction of the scales of two linears."""
    adapter, untouched = exact_model("llama"), exact_model("llama")
    swap(adapter)
    windows = token_ids(2)
    teacher = Teacher(StreamedModel(untouched, windows))
    student = Student(StreamedModel(adapter, windows), {}, {}, teacher, None, Nowhere())
    modules = {}
    for name in (adapter.name(0, "self_attn.q_proj"), adapter.name(1, "mlp.down_proj")):
        weight = adapter.model.get_submodule(name).weight
        modules[f"{name}.weight"] = scaled(SMOOTH["int4"].quantize(weight), weight, codes)
    # codes that are made by a scale of their own are constants here: only decoding moves smoothly
    moving = [module.post for module in modules.values()]
    ways = [draw(*each.shape, seed=7, dtype=F64) for each in moving]

    def divergence():
        p, q = (logits(each, windows[:1]).log_softmax(-1) for each in (untouched, adapter))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.enable_grad(), made(adapter, modules):
        loss = student.loss(windows[:1], again=False)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(divergence(), rel=1e-5)
        slope = float(sum((each.grad * way).sum() for each, way in zip(moving, ways)))
        values = []
        for h in (1e-4, -2e-4):
            for each, way in zip(moving, ways):
                each.data += h * way
            values.append(divergence())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


class Nowhere:
    """Keeps nothing."""

    def load(self):
        return None

    def save(self, tensors, values):
        pass
