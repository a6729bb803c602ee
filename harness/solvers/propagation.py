r"""qep: weights move before they are quantized, to undo what earlier layers did to what they read.

    a    [N, n]  what a site will read: through the solved blocks, quantized as it is read
    x_f  [N, n]  what it read in the untouched model, through the same encoder
    H = 2/N a^T a,    D = 2/N (x_f - a)^T a

    W <- W + alpha (W D) (H + damp mean(diag H) I)^-1

Where a decoder is free (AdaCodec), x_f is what the untouched model reads, not encoded, and W_o what
acts on it there; then x_f W_o^T is what is wanted, and the step is towards

    C = 2/N W_o x_f^T a:    W <- W + alpha (C - W H) (H + ..)^-1,    C - W H = W_o D + (W_o - W) H

which is the same for W_o = W E^T and an orthogonal encoder E.

alpha = 1, damp = 0 is the least-squares solution of  a W'^T = x_f W^T  (or x_f W_o^T). Then scales
are chosen from the moved W, and the solver works towards it.

Source: QEP (arXiv 2504.09629). Differences: damped a hundred times more than published (1 instead
of .01, where it fits the calibration text at the cost of others), with a of what is read, in
float64, by one factor for all linears of a site.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.solvers.inverses import dampings
from harness.solvers.problem import Problem


def compensated(problem: Problem, alpha: float, damp: float) -> Problem:
    """The problem with its weights moved; as it is where its drift is not known.

    Its Hessian has to be whole. Where it has no factor, damped so, it is damped as gptq's is then.
    """
    if problem.drift is None or problem.hessian is None:
        return problem
    factor = None
    for tried in dampings(damp):
        damped = problem.hessian.to(torch.float64, copy=True)
        damped.diagonal().add_(tried * damped.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
    else:  # nothing was read
        return problem
    # D (L L^T)^-1 once, whose product with each W is all that is left
    step = alpha * torch.cholesky_solve(problem.drift.double().T, factor).T
    if problem.origins is None:
        moved = {
            name: torch.addmm(weight.double(), weight.double(), step).to(weight.dtype)
            for name, weight in problem.weights.items()
        }
        return replace(problem, weights=moved)
    across = alpha * torch.cholesky_solve(problem.hessian.double(), factor).T
    moved = {}
    for name, weight in problem.weights.items():
        origin = problem.origins[name].double()
        away = torch.addmm(weight.double(), origin - weight.double(), across)
        moved[name] = away.addmm_(origin, step).to(weight.dtype)
    return replace(problem, weights=moved)
