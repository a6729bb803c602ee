"""What leaves a quantized value alone or moves with it: a second quantization, signs, zeros, the
order of groups, powers of two."""

import pytest
import torch
from number_formats import BLOCK_MX, FORMATS, blocks_of, data, identical, named

from harness.formats import NVFP4

CLIPPING = (
    "int5_aimet",
    "int4_half_range",
    "int2_mse",
)  # reach the least code, which has no positive twin
SYMMETRIC = [name for name, format in FORMATS.items() if format.symmetric and name not in CLIPPING]


@named("fp4", "int4", "int4_group", "int4_tensor", *BLOCK_MX)
def test_requantizing_changes_nothing(format):
    dq = format.fake(data(64, 256))
    identical(format.fake(dq), dq)


@named("int4_asym", "int8_asym_token", "nvfp4")
def test_requantizing_moves_the_last_bit_at_most(format):
    x = data(64, 256)
    q = format.quantize(x)
    dq = q.dequantize()
    moved = (format.fake(dq) - dq).abs()
    if isinstance(format, NVFP4):
        unit, moved = (
            dq.abs(),
            moved.masked_fill((q.scales.scale.float() < 2**-6).repeat_interleave(16, dim=-1), 0),
        )
    else:
        blocks = blocks_of(format, dq)
        unit = (
            (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True))
            .expand_as(blocks)
            .reshape(dq.shape)
        )
    assert (moved <= torch.nextafter(unit, torch.tensor(torch.inf)) - unit).all()


@named(*SYMMETRIC)
def test_sign_symmetry(format):
    x = data(32, 128)
    assert torch.equal(format.fake(-x), -format.fake(x))


@named()
def test_zero_stays_zero(format):
    zeros = torch.zeros(4, 64)
    identical(format.fake(zeros), zeros)
    identical(format.fake(-zeros), zeros)
    x = data(4, 64)
    x[1] = 0
    assert (format.fake(x)[1] == 0).all()


@named("int4_group", "int4_asym", "fp4", "nvfp4", "fouroversix", *BLOCK_MX)
def test_permuting_groups_permutes_the_result(format):
    x = data(16, 256)
    order = torch.randperm(256 // format.group_size, generator=torch.Generator().manual_seed(3))
    permuted = blocks_of(format, x)[:, order].flatten(-2)
    identical(format.fake(permuted), blocks_of(format, format.fake(x))[:, order].flatten(-2))


@named("fp4", "nvfp4", "nvfp4_token", "nvfp4_256", "fouroversix", *BLOCK_MX)
@pytest.mark.parametrize("k", [-9, 1, 14])
def test_powers_of_two_pass_through(format, k):
    x = data(32, 128)
    identical(format.fake(x * 2.0**k), format.fake(x) * 2.0**k)
