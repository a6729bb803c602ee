r"""qep: weights move before they are quantized, to undo what earlier layers did to what they read.

    a    [N, n]  what a site will read: through the solved blocks, quantized as it is read
    x_f  [N, n]  what it read in the untouched model, through the same encoder
    H = 2/N a^T a,    D = 2/N (x_f - a)^T a

    W <- W + alpha (W D) (H + damp mean(diag H) I)^-1

alpha = 1, damp = 0 is the least-squares solution of  a W'^T = x_f W^T. Then scales are chosen from
the moved W, and the solver works towards it.

Source: QEP (arXiv 2504.09629). Differences: damped a hundred times more than published (1 instead
of .01, where it fits the calibration text at the cost of others), with a of what is read, in
float64, by one factor for all linears of a site.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.solvers.base import Problem


def compensated(problem: Problem, alpha: float, damp: float) -> Problem:
    """The problem with its weights moved; as it is where its drift is not known.

    Its Hessian has to be whole.
    """
    if problem.drift is None or problem.hessian is None:
        return problem
    damped = problem.hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(damp * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # features that are always 0, undamped
        return problem
    # D (L L^T)^-1 once, whose product with each W is all that is left
    step = alpha * torch.cholesky_solve(problem.drift.double().T, factor).T
    moved = {
        name: torch.addmm(weight.double(), weight.double(), step).to(weight.dtype)
        for name, weight in problem.weights.items()
    }
    return replace(problem, weights=moved)
