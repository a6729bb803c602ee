"""Grids of small floats, rounded to as torch casts and with every rule for ties, and codes of four
bits packed two to a byte."""

import pytest
import torch

from harness.formats import E2M1, E2M3, E3M2, E4M3, E5M2, pack_nibbles, unpack_nibbles


@pytest.mark.parametrize("grid", [E2M1, E2M3, E3M2, E4M3, E5M2], ids=lambda g: g.name)
def test_grid_points_are_fixed_and_codes_unique(grid):
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = grid.decode(codes)
    codes, values = codes[~values.isnan()], values[~values.isnan()]
    assert values.max() == grid.max
    assert torch.equal(grid.round_(values.clone()), values)
    nonzero = values != 0
    assert torch.equal(grid.encode(values, values < 0)[nonzero], codes[nonzero])
    assert torch.equal(
        grid.round_(torch.tensor([1e30, -torch.inf])), torch.tensor([grid.max, -grid.max])
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_casts_are_those_of_torch(dtype):
    grid = E4M3 if dtype == torch.float8_e4m3fn else E5M2
    x = torch.exp2(torch.linspace(-20, 20, 4001)).clamp(max=grid.max)
    assert torch.equal(grid.round_(x.clone()), x.to(dtype).float())


def test_ties():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat([ties, -ties])
    rules = {
        "even": [0, 1, 1, 2, 2, 4, 4],
        "zero": [0, 0.5, 1, 1.5, 2, 3, 4],
        "away": [0.5, 1, 1.5, 2, 3, 4, 6],
    }
    for rule, want in rules.items():
        want = torch.tensor([float(v) for v in want])
        assert torch.equal(E2M1.round_(ties.clone(), rule), torch.cat([want, -want]))
    off = torch.cat([torch.nextafter(ties, 2 * ties), torch.nextafter(ties, 0 * ties)])
    for rule in ("zero", "away"):
        assert torch.equal(E2M1.round_(off.clone(), rule), E2M1.round_(off.clone()))


def test_packing_is_invertible():
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 8, 33):
        codes = torch.randint(0, 16, (3, n), generator=g, dtype=torch.uint8)
        assert torch.equal(unpack_nibbles(pack_nibbles(codes), n), codes)
        signed = codes.to(torch.int8) - 8
        assert torch.equal(unpack_nibbles(pack_nibbles(signed), n, signed=True), signed)
    assert pack_nibbles(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 0x21
