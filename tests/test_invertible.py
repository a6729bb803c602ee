"""Learned matrices stay invertible wherever they are taken, alone and in a Kronecker product."""

import pytest
import torch
from affine_parts import F64, close, normal, wander

from harness.linalg.invertible import Invertible
from harness.linalg.stiefel import random_orthogonal
from harness.transforms.affine_sites import Site, placed
from harness.transforms.flatquant import Pair


@pytest.mark.parametrize("start", [normal(3, 8, 8), random_orthogonal(12, torch.Generator())])
def test_a_matrix_begins_as_it_is_told_and_stays_invertible(start):
    learned = Invertible(start).double()
    close(learned.matrices()[0], start)
    before = learned.condition()
    assert before == pytest.approx(float(torch.linalg.cond(start).max()), rel=1e-8)
    matrix, inverse = (m.detach() for m in wander(learned).matrices())
    assert float((matrix - start).abs().max()) > 0.1
    assert float((matrix @ inverse - torch.eye(len(start.mT[0]), dtype=F64)).abs().max()) < 1e-11
    found = float(torch.linalg.cond(matrix).max())
    assert found == pytest.approx(learned.condition(), rel=1e-6)
    assert found < before * float((2 * learned.r.detach().abs().max()).exp()) * (1 + 1e-6)
    # and in the precision that is learned in
    matrix, inverse = (m.detach() for m in learned.float().matrices())
    assert float((matrix @ inverse - torch.eye(matrix.shape[-1])).abs().max()) < 1e-5


def test_the_gradients_of_a_matrix_and_its_inverse():
    learned = wander(Invertible(normal(2, 4, 4)).double())

    def matrices(a, r, b):
        for parameter, value in (("a", a), ("r", r), ("b", b)):
            learned.__dict__[parameter] = value
        return learned.matrices()

    values = [learned.a, learned.r, learned.b]
    learned._parameters.clear()
    assert torch.autograd.gradcheck(matrices, values)


def test_a_pair_is_the_kronecker_product_behind_the_scale():
    pair = wander(Pair(random_orthogonal(4, torch.Generator()), normal(6, 6), 24).double())
    left, right = pair.left.matrices()[0], pair.right.matrices()[0]
    dense = torch.diag((-pair.log_scale).exp()) @ torch.kron(left, right)
    x, w = normal(5, 24), normal(7, 24, seed=1)
    placement = placed([Site((0, "attn_in"), pair, {})])
    merged, online = placement.merged[0, "attn_in"], placement.online[0, "attn_in"]
    close(online.encode(merged.encode(x)), x @ dense)
    close(online.absorb(merged.absorb(w)), w @ torch.linalg.inv(dense).mT)
