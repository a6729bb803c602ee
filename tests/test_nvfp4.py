"""NVFP4's global scale, of a tensor, a token, several weights or none, and the choice of Four Over
Six between two scales of a block."""

from dataclasses import replace

import pytest
import torch
from number_formats import blocks_of, data, identical, named

from harness.config.errors import ConfigError
from harness.formats import NVFP4, FourOverSix, Scales, error


def test_four_over_six_takes_the_better_candidate():
    x = data(32, 128)
    for choose, norm in (("mse", 2.0), ("mae", 1.0)):
        format = FourOverSix(choose=choose)
        chosen = format.quantize(x)
        six = NVFP4(global_scale="amax_256").scales(x).scale
        only_six = format.quantize(x, Scales(six, None, chosen.scales.global_scale)).dequantize()
        e, e_six = (
            error(blocks_of(format, x), blocks_of(format, dq), norm)
            for dq in (chosen.dequantize(), only_six)
        )
        assert (e <= e_six * (1 + 1e-5)).all()
        assert (chosen.scales.scale.float() != six.float()).any()


@named("nvfp4_token")
def test_a_scale_per_token_keeps_tokens_apart(format):
    x = data(3, 5, 64)
    identical(format.fake(x)[1, 2], format.fake(x[1, 2]))


@pytest.mark.parametrize(
    "format",
    [NVFP4(role="activation", scope="static"), FourOverSix(role="activation", scope="static")],
)
def test_static_global_scale(format):
    x = data(330, 416)
    assert format.needs_static
    g = format.global_from_amax(x.abs().amax())
    identical(format.fake(x, global_scale=g), replace(format, scope="tensor").fake(x))
    identical(format.fake(x[:7], global_scale=g), format.fake(x, global_scale=g)[:7])
    identical(format.fake(x, global_scale=g), format.quantize(x, global_scale=g).dequantize())
    larger = format.fake(100 * x, global_scale=g)
    limit = x.abs().amax() * (1 if type(format) is NVFP4 else 1.75)
    assert larger.abs().max() <= limit * (1 + 1e-6)
    with pytest.raises(ConfigError, match="scope=static needs a calibrated global scale"):
        format.fake(x)


def test_a_shared_global_scale_is_that_of_the_largest():
    a, b = data(16, 64), 4 * data(16, 64, seed=1)
    format = NVFP4()
    shared = format.global_from_amax(torch.maximum(a.abs().amax(), b.abs().amax()))
    assert torch.equal(
        shared, torch.minimum(format.scales(a).global_scale, format.scales(b).global_scale)
    )
    together = format.fake(torch.cat([a, b]))
    identical(format.quantize(a, global_scale=shared).dequantize(), together[:16])


def test_fixed_decode_scale_has_its_range():
    format = NVFP4(global_scale="fixed")
    peaks = torch.tensor([2.0**-11, 1.0, 448.0, 1000.0])
    dq = format.fake(peaks[:, None].repeat(1, 16))[:, 0]
    assert dq[0] == 0
    torch.testing.assert_close(dq[1:3], peaks[1:3], rtol=0.07, atol=0)
    assert dq[3] == 448
