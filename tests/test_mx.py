"""MX: scales that are powers of two, by each rule for them, and elements as exact in the model's
own dtype."""

from dataclasses import replace

import torch
from number_formats import BLOCK_MX, blocks_of, data, extremes, identical, named

from harness.formats import MX


def test_mx_scale_rules():
    g = torch.Generator().manual_seed(0)
    peaks = torch.exp2(torch.rand(4000, generator=g, dtype=torch.float64) * 250 - 130).float()
    powers = 6 * torch.exp2(torch.arange(-140.0, 120.0))
    peaks = torch.cat(
        [peaks, powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers * 0)]
    )
    peaks = peaks[peaks > 0]
    x = torch.zeros(len(peaks), 32)
    x[:, 5] = peaks

    def scale(rule):
        format = MX(mx_scale=rule)
        return format.scales(x).scale[:, 0].int(), format.lattice(format.scales(x))[0][
            :, 0
        ].double()

    k, s = scale("rceil")
    assert (s * 6 * (1 + 2**-23) >= peaks.double()).all()
    assert ((s * 3 < peaks.double()) | (k == 0)).all()
    k, s = scale("floor")
    assert ((s * 4 <= peaks.double()) | (k == 0)).all()
    assert (s * 8 > peaks.double()).all()
    k, s = scale("ceil")
    assert (s * 4 >= peaks.double()).all()
    k, s = scale("even")
    assert (s * 7 > peaks.double()).all()
    assert ((s * 3.5 <= peaks.double()) | (k == 0)).all()


@named(*BLOCK_MX)
def test_mx_elements_in_float32_are_those_in_bfloat16(format):
    """Powers of two: every quotient and product is as exact in the model's own dtype, as serving
    engines compute it."""
    for x in (*extremes(torch.bfloat16).values(), data(64, 96, dtype=torch.bfloat16)):
        blocks, (scale,) = blocks_of(format, x), format.lattice(format.scales(x), torch.bfloat16)
        own = format.grid.round_(blocks / scale.unsqueeze(-1), format.fp4_ties) * scale.unsqueeze(
            -1
        )
        identical(replace(format, compute_dtype="input").fake(x), own.flatten(-2))


def test_sign_of_zero_lives_in_the_codes():
    x = torch.tensor([[6.0, -0.0, -0.01, 0.01] + [0.0] * 28])
    q = MX().quantize(x)
    assert q.codes[0, :4].tolist() == [7, 0, 8, 0]
    assert not q.dequantize().signbit().any()
