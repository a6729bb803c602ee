"""Integers: their error in steps, zero points and offsets, the dtype of their scales, ranges seen
before."""

import pytest
import torch
from number_formats import blocks_of, data, identical, named

from harness.config.errors import ConfigError
from harness.formats import Integer


@named(
    "int4",
    "int4_group",
    "int4_asym",
    "int8_asym_token",
    "int4_offset",
    "int5_aimet",
    "int4_half_range",
)
def test_integer_error_is_at_most_half_a_step(format):
    x = data(32, 128)
    q = format.quantize(x)
    inside = (q.codes > format.qmin) & (q.codes < format.qmax)
    off = blocks_of(format, (q.dequantize() - x).abs().masked_fill(~inside, 0))
    slack = 1.0 if format.zp_order == "round_then_add" and not format.symmetric else 0.5
    assert (off <= q.scales.scale.unsqueeze(-1) * slack * (1 + 1e-5)).all()


def test_asymmetric_groups_far_from_zero_keep_their_resolution():
    x = 100 + data(8, 64) / 50
    dq = Integer(granularity="group", group_size=32, symmetric=False).fake(x)
    assert (dq - x).abs().max() < 0.2 * (x.amax() - x.amin())
    constant = torch.full((2, 32), 0.375)
    for role in ("weight", "activation"):
        format = Integer(granularity="group", group_size=32, symmetric=False, role=role)
        torch.testing.assert_close(format.fake(constant), constant, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [-0.5, 0.5, 0.0])
@pytest.mark.parametrize(
    "knobs",
    [
        {"zp_range": "signed"},
        {"zp_range": "signed", "zp_order": "add_then_round"},
        {"zp_range": "signed", "incl0": "always"},
        {"zp_range": "unsigned", "incl0": "always"},
        {"zp_range": "signed", "role": "activation"},
        {"zp_range": "signed", "scale_dtype": "bf16", "degenerate": "eps"},
        {"zp_range": "signed", "granularity": "channel", "group_size": None},
        {"zp_range": "signed", "granularity": "tensor", "group_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_are_codes_keep_groups_on_one_side_of_zero(bits, knobs, side):
    """Zero lies in the range of each group, so no code is lost to a zero point that had to be
    clamped."""
    x = side + data(16, 64) / 500
    format = Integer(
        bits=bits, symmetric=False, **{"granularity": "group", "group_size": 32} | knobs
    )
    q = format.quantize(x)
    assert q.scales.zero.min() >= format.qmin and q.scales.zero.max() <= format.qmax
    step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / (2**bits - 1)
    assert (q.dequantize() - x).abs().max() <= step * 1.01


def test_float_offsets_and_unsigned_groups_need_no_zero():
    x = 0.5 + data(16, 64) / 500
    for knobs in (
        {},
        {"incl0": "never"},
        {"zp": "float_offset", "zp_range": "signed", "incl0": "never"},
    ):
        format = Integer(bits=8, granularity="group", group_size=32, symmetric=False, **knobs)
        assert (format.fake(x) - x).abs().max() <= (x.amax() - x.amin()) / 255


def test_scales_in_the_models_dtype():
    w = data(8, 128, dtype=torch.bfloat16)
    format = Integer(scale_dtype="input")
    assert format.scales(w).scale.dtype == torch.bfloat16
    assert torch.equal(format.scales(w.float(), dtype=torch.bfloat16).scale, format.scales(w).scale)
    q = format.quantize(w.float(), dtype=torch.bfloat16)
    identical(q.dequantize(), format.fake(w))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_range_is_the_calibrated_one(symmetric):
    """Values quantized on the grid of the range seen, whatever they are themselves; beyond it they
    are clamped."""
    static = Integer(
        bits=8, granularity="tensor", symmetric=symmetric, role="activation", range="static"
    )
    seen = data(64, 48)
    g = static.calibrated(*torch.aminmax(seen))
    assert g.tolist() == [seen.min(), seen.max()]
    assert torch.equal(static.fake(seen, global_scale=g), static.dynamic().fake(seen))
    half = static.fake(seen / 2, global_scale=g)
    assert not torch.equal(half, static.dynamic().fake(seen / 2))
    step = seen.abs().max() / 127 if symmetric else (seen.max() - seen.min()) / 255
    assert (half - seen / 2).abs().max() <= step / 2 * 1.001
    assert static.fake(seen * 9, global_scale=g).abs().max() <= seen.abs().max() + step
    with pytest.raises(ConfigError, match="range=static needs a calibrated range"):
        static.fake(seen)
    with pytest.raises(ConfigError, match="range=dynamic"):
        Integer(range="static")
