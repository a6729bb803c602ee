"""IF4 against its definition, written again block by block."""

import pytest
import torch
from number_formats import data

from harness.config.errors import ConfigError
from harness.formats import IF4, NVFP4

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([-FP4, FP4]).double().unique()
INT4 = torch.arange(-7, 8).double() * 6 / 7
MEASURES = {
    "mse": lambda d: d.square().sum(),
    "mae": lambda d: d.abs().sum(),
    "abs_max": lambda d: d.abs().amax(),
}


def nearest(x, points):
    return points[(x[:, None] - points).abs().argmin(1)]


def candidates(block, amax):
    """The block on the two lattices, in float64; both under the E4M3 scale of amax_b / 6."""
    s = (block.abs().amax() / 6 * (2688 / amax)).float().to(torch.float8_e4m3fn).double()
    step = s * amax / 2688
    if step == 0:
        return torch.zeros_like(block), torch.zeros_like(block)
    return tuple(nearest(block / step, points) * step for points in (FP4, INT4))


@pytest.mark.parametrize("choose", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_takes_the_lattice_of_less_error(choose, dtype):
    w = data(24, 96, dtype=dtype)
    w[3] = 0
    w[4] = torch.linspace(-1, 1, 96)  # even within each block: INT4's
    w[5, ::16] = 6.0  # few that are large
    q = IF4(choose=choose).quantize(w)
    chosen = q.scales.scale.view(torch.uint8) >= 0x80
    exact = w.double()
    amax = exact.abs().amax()
    got = IF4(choose=choose).fake(w.float()).double()
    for i in range(24):
        for j in range(6):
            block = exact[i, 16 * j : 16 * j + 16]
            floats, integers = candidates(block, amax)
            errors = [MEASURES[choose](each - block) for each in (floats, integers)]
            own = got[i, 16 * j : 16 * j + 16]
            taken = integers if chosen[i, j] else floats
            # a tie of two neighbours may fall either way in float32, at the same error
            assert torch.allclose(MEASURES[choose](own - block), MEASURES[choose](taken - block))
            assert ((own - taken).abs() <= 1e-5 * amax).float().mean() > 0.9
            if abs(errors[0] - errors[1]) > 1e-5 * (errors[0] + errors[1]):
                assert bool(chosen[i, j]) == bool(errors[1] < errors[0])
    assert not chosen[3].any()
    assert 0.1 < chosen.float().mean() < 0.9


def test_both_lattices_reach_the_blocks_maximum():
    """7 of INT4 where 6 of FP4 is, so the one scale serves both."""
    x = torch.zeros(2, 16)
    x[0] = torch.arange(-8, 8) / 8 * 7 / 6
    x[1, 0] = 7 / 6
    q = IF4(choose="mse").quantize(x)
    integer = (q.scales.scale.view(torch.uint8) >= 0x80).flatten()
    assert integer.tolist() == [True, False]
    assert q.codes[0, 0] == 0x9 and q.codes[1, 0] == 0x7  # -7, and 6
    torch.testing.assert_close(q.dequantize()[1, 0], x[1, 0], rtol=0.07, atol=0)


def test_a_choice_is_never_worse_than_nvfp4():
    """By the error that decides, and whatever is rounded by NVFP4's own order of operations."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    e, e_nvfp4 = (
        (format.fake(x) - x).square().unflatten(-1, (-1, 16)).sum(-1) for format in (IF4(), NVFP4())
    )
    assert (e <= e_nvfp4 * (1 + 1e-4)).all()
    assert e.sum() < 0.95 * e_nvfp4.sum()


def test_what_if4_defines_itself_is_refused():
    with pytest.raises(ConfigError, match="IF4: global_scale=amax_256 is not legal"):
        IF4(global_scale="amax_256")
    with pytest.raises(ConfigError, match="IF4: observer=mse is not legal"):
        IF4(observer="mse")


def test_a_scale_that_moves_keeps_its_elements():
    """A search over scales never turns FP4 into INT4; the scale itself is NVFP4's."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    scales = IF4().scales(x, global_scale=x.abs().amax().reshape(1))
    moved = IF4().rescaled(scales, torch.full(scales.scale.shape, 0.5))
    before, after = (each.scale.view(torch.uint8) for each in (scales, moved))
    assert torch.equal(before >= 0x80, after >= 0x80)
    assert (before >= 0x80).any() and (before < 0x80).any()
    halved = (before & 0x7F).view(torch.float8_e4m3fn).float() / 2
    assert torch.equal((after & 0x7F).view(torch.float8_e4m3fn).float(), halved)
