"""Block-diagonal products against the dense matrix, and their gradients."""

import pytest
import torch

from harness.linalg.blocks import times

SHAPES = [(4, 6), (1, 24), (24, 1), (3, 8)]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_product_is_that_of_the_dense_matrix(count, size):
    x, blocks = random(2, 5, count * size), random(count, size, size, seed=1)
    torch.testing.assert_close(times(x, blocks), x @ torch.block_diag(*blocks), rtol=0, atol=1e-12)
    shared = times(x, blocks[0])
    torch.testing.assert_close(
        shared, x @ torch.block_diag(*[blocks[0]] * count), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("count", "size"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients(count, size, transposed):
    x, blocks = (
        random(3, count * size).requires_grad_(),
        random(count, size, size, seed=1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda x, m: times(x, m.mT if transposed else m), (x, blocks))


def test_a_strided_input_and_a_low_dtype():
    x, blocks = random(24, 7, dtype=torch.float32).T, random(3, 8, 8, seed=1)
    torch.testing.assert_close(times(x, blocks), times(x.contiguous(), blocks))
    half = times(x.bfloat16(), blocks)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), times(x, blocks), rtol=0.02, atol=0.05)
