"""Learning starts from the solved codes and ends with what is stored, in every format: scales on
their grid, weights in the cells of their codes."""

import pytest
import torch
from tuners import draw, scaled, shift, solved

from harness.formats import FP4, MX, NVFP4, FourOverSix, Integer
from harness.tune.cells import rounded, within
from harness.tune.weights import Master

FORMATS = {
    "int4_channel": Integer(),
    "int4_group": Integer(granularity="group", group_size=16),
    "int4_asymmetric": Integer(granularity="group", group_size=16, symmetric=False),
    "int4_offset": Integer(symmetric=False, zp="float_offset"),
    "int3_tensor": Integer(bits=3, granularity="tensor"),
    "int4_bf16_scales": Integer(granularity="group", group_size=16, scale_dtype="bf16"),
    "fp4": FP4(group_size=16),
    "nvfp4": NVFP4(),
    "fouroversix": FourOverSix(),
    "mxfp4": MX(),
    "mxfp6": MX(bits=6, element="e3m2"),
}
CODES = ("fixed", "rounded", "dual")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_learned_is_stored(name, codes):
    """The first value is the solved one; any later one is what its codes and scales decode to."""
    format = FORMATS[name]
    if isinstance(format, FourOverSix) and codes != "fixed":
        return  # refused
    weight, q = solved(format, moved=0.3)
    module = scaled(q, weight, codes)
    assert torch.equal(module(), q.dequantize())
    shift(module, size=0.5)
    stored = module.qtensor()
    assert torch.equal(module(), stored.dequantize())
    assert not torch.equal(stored.dequantize(), q.dequantize())
    assert stored.scales.scale.dtype == q.scales.scale.dtype
    assert stored.bits() == q.bits()
    assert torch.equal(stored.codes, q.codes) == (codes == "fixed")
    module().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["nvfp4", "fouroversix", "mxfp4", "int4_bf16_scales"])
def test_gradients_pass_the_grid_of_a_scale(name):
    """A stored scale is a constant of its cell, and learning goes on as if it were none."""
    _, q = solved(FORMATS[name])
    module = shift(scaled(q, None, "fixed"), size=0.1)
    upstream = draw(6, 64, seed=3)
    value = module()
    value.backward(upstream)
    wanted = FORMATS[name].split((upstream * value.detach()).double()).sum(-1)
    assert torch.allclose(module.post.grad.double(), wanted, rtol=1e-5, atol=1e-6)
    module.post.data += 1e-4
    assert (module() == value).float().mean() > 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_lies_in_the_cell_of_its_code(name):
    format = FORMATS[name]
    weight, q = solved(format, moved=0.3)
    found = within(weight, q)
    value = q.dequantize()
    assert torch.equal(rounded(found, format, q.scales, torch.float32), value)
    stays = rounded(weight, format, q.scales, torch.float32) == value
    assert torch.equal(found[stays], weight[stays])
    assert 0.05 < stays.float().mean() < 0.95
    assert ((found - value).abs() <= (weight - value).abs() * (1 + 1e-6) + 1e-7).all()
    # on the way, and not far from where the code changes: a little further it does
    further = found + 0.02 * (weight - value)
    changed = rounded(further, format, q.scales, torch.float32) != value
    assert changed[~stays].all()


@pytest.mark.parametrize("name", FORMATS)
def test_trained_weights_are_quantized_again(name):
    format = FORMATS[name]
    weight, q = solved(format, moved=0.3)
    module = Master(q, within(weight, q))
    assert torch.equal(module(), q.dequantize())
    upstream = draw(6, 64, seed=3)
    module().backward(upstream)
    assert torch.equal(module.weight.grad, upstream), "straight through"
    shift(module, size=0.05)
    wanted = format.quantize(module.weight.detach(), scales=q.scales)
    assert torch.equal(module(), wanted.dequantize())
    assert torch.equal(module.qtensor().codes, wanted.codes)
    assert not torch.equal(wanted.codes, q.codes)
    (rate,) = module.rates().values()
    assert rate == pytest.approx(float(module.weight.detach().square().mean().sqrt()))
