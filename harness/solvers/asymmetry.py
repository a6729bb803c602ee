r"""gptaq: gptq's loop towards what the untouched model would have read, with what will be read.

    a [N, n] what a site will read,   x_f [N, n] what it read in the untouched model
    H = 2/N a^T a + damp mean(diag H) I,   H^-1 = U^T U,   D = 2/N (x_f - a)^T a
    P = alpha ((D U^T) strictly upper) U
    for column i, before the next is rounded:   w_j <- w_j + w_i P_ij   for j > i

P_ij is the share of column i's drift w_i (x_f - a)_i that the columns after it make up for:
P_iF = alpha D_iF (H_FF)^-1 with F = {j > i}, all at once, since U_FF^T U_FF = (H_FF)^-1. The update
stands beside gptq's own (columns.py), and w_i is the column as it is due.

Source: GPTAQ (arXiv 2504.02692). Differences: H in P has a damping of its own, propagate_damp (its
code has one for both, which is propagate_damp = damp); columns of later blocks get w_i P_ij too,
where its code adds q_i P_ij, so that `block` changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.solvers.inverses import Begun, dampings, uppers


def pulls(begun: Sequence[Begun], alpha: float, damp: float, dtype: torch.dtype) -> Tensor | None:
    """P [problems, in, in], in the order of each one's columns.

    None where drifts are not known. Where H, so damped, is not positive definite, it is damped as
    gptq's is then; all zero where nothing helps.
    """
    drifts = [each.problem.drift for each in begun]
    if any(drift is None for drift in drifts):
        return None
    upper, good = uppers(begun, damp, dtype)
    for index in (~good).nonzero()[:, 0].tolist():
        for tried in dampings(damp):
            unit, fine = uppers([begun[index]], tried, dtype)
            if fine.all():
                upper[index], good[index] = unit[0], True
                break
    found = torch.empty_like(upper)
    for each, u, pull in zip(begun, upper, found):
        drift = each.problem.drift
        assert drift is not None
        drift = drift.to(dtype)
        if each.reordered:
            drift = drift[each.order[:, None], each.order]
        torch.mm((drift @ u.T).triu_(1), u, out=pull)
    found *= alpha
    found[~good] = 0
    return found
