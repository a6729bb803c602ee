"""Rotations that leave the vector of ones alone, which are those that LayerNorm commutes with."""

import pytest
import torch
from torch.nn import functional as F

from harness.linalg.hadamard import hadamard
from harness.linalg.stiefel import random_orthogonal
from harness.transforms.quarot import fixing_ones

F64 = torch.float64
FAULT = pytest.mark.xfail(strict=True, reason="a fault of the harness: sweeps/ARCHITECTURES.md")


def rotations(order: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(order)
    signs = torch.diag(torch.randint(2, (order,), generator=generator).to(F64) * 2 - 1)
    return {
        "random": random_orthogonal(order, generator),
        "hadamard": hadamard(order),
        "signed": signs @ hadamard(order),
        "identity": torch.eye(order, dtype=F64),
    }


@pytest.mark.parametrize("order", [12, 64, 128])
@pytest.mark.parametrize("kind", ["random", "hadamard", "signed", "identity"])
def test_a_rotation_made_to_fix_the_ones_does_and_is_one_still(order, kind):
    fixed = fixing_ones(rotations(order)[kind])
    ones = torch.ones(order, dtype=F64)
    eye = torch.eye(order, dtype=F64)
    torch.testing.assert_close(fixed @ fixed.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(ones @ fixed, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(fixed @ ones, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(fixing_ones(fixed), fixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [64, 128])
@pytest.mark.parametrize("kind", ["random", "signed", pytest.param("hadamard", marks=FAULT)])
def test_a_rotation_made_to_fix_the_ones_mixes_every_feature(order, kind):
    """As R did: an outlier of any one feature is spread. A Hadamard matrix without signs has ones
    in its first row, which the reflection turns into the first feature alone."""
    fixed = fixing_ones(rotations(order)[kind])
    assert fixed.abs().amax(dim=1).max() < 0.6


def test_layer_norm_commutes_with_a_rotation_only_if_that_fixes_the_ones():
    order = 64
    drawn = rotations(order)["random"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, order, generator=generator, dtype=F64) + 1
    fixed = fixing_ones(drawn)
    normed = F.layer_norm(x, (order,))
    torch.testing.assert_close(F.layer_norm(x @ fixed, (order,)), normed @ fixed)
    assert (F.layer_norm(x @ drawn, (order,)) - normed @ drawn).abs().max() > 0.1
