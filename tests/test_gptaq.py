"""gptaq: its loop against least squares, column after column and from activations alone."""

from dataclasses import replace

import pytest
import torch

from harness.config.errors import ConfigError
from harness.formats import NVFP4, Integer
from harness.solvers import AWQ, GPTQ, RTN, Problem

F64 = torch.float64
INT4 = Integer(granularity="group", group_size=32)
N = 96


def drawn(format=INT4, seed=0, rows=(24, 8), tokens=500):
    """A problem, its activations a and what they ought to be, x_f, float64."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(N, N, generator=random, dtype=F64) / N**0.5
    x = torch.randn(tokens, N, generator=random, dtype=F64) @ (mixing + torch.eye(N, dtype=F64))
    a = x + 0.2 * torch.randn(tokens, N, generator=random, dtype=F64) @ mixing
    weights = {
        f"{seed}.w{i}": torch.randn(count, N, generator=random, dtype=F64)
        for i, count in enumerate(rows)
    }
    hessian = 2 / tokens * a.T @ a
    drift = 2 / tokens * (x - a).T @ a
    return Problem(weights, dict.fromkeys(weights, format), hessian, drift=drift), x, a


def gptaq(**changed):
    """The solver, undamped and exact unless told otherwise."""
    settings = {"damp": 0.0, "precision": "float64", "propagate_damp": 0.0} | changed
    return GPTQ(propagate="gptaq", **settings)


def column_by_column(w, a, x, snap, alpha):
    """Each column's error, and its share of the drift, made up for by those after it as least
    squares over the activations has it. No Hessian, no inverse, no blocks."""
    w = w.clone()
    q = torch.empty_like(w)
    for i in range(w.shape[1]):
        q[:, i] = snap(i, w[:, i])
        after = a[:, i + 1 :]
        if after.shape[1] == 0:
            break
        missing = torch.stack([a[:, i], alpha * (x - a)[:, i]], 1)
        error, drift = torch.linalg.lstsq(after, missing).solution.T
        w[:, i + 1 :] += torch.outer(w[:, i] - q[:, i], error) + torch.outer(w[:, i], drift)
    return q


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("order", ["default", "activation"])
@pytest.mark.parametrize("format", [INT4, NVFP4()], ids=["int4", "nvfp4"])
def test_it_is_least_squares_column_by_column(format, order, alpha):
    problem, x, a = drawn(format, rows=(24,))
    w = problem.weights["0.w0"]
    scales = format.scales(w, global_scale=format.global_from_amax(w.abs().amax()))
    lattice = [t.expand(len(w), -1) for t in format.lattice(scales)]
    perm = torch.arange(N)
    if order == "activation":
        assert problem.hessian is not None
        perm = problem.hessian.diagonal().argsort(descending=True, stable=True)

    def snap(i, column):
        group = perm[i] // format.group(N)
        return format.snap(column.contiguous(), *(t[:, group].contiguous() for t in lattice))

    wanted = torch.empty_like(w)
    wanted[:, perm] = column_by_column(w[:, perm], a[:, perm], x[:, perm], snap, alpha)
    found = gptaq(order=order, propagate_alpha=alpha).solve(problem)
    found = found.qtensors["0.w0"].dequantize()
    assert ((found - wanted).abs() > 1e-5).float().mean() < 2e-3  # ties may fall to either side
    plain = replace(problem, drift=None)
    without = gptaq(order=order).solve(plain).qtensors["0.w0"].dequantize()
    assert ((without - wanted).abs() > 1e-5).float().mean() > 0.05


@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_block_size_does_not_matter(scales):
    problem, _, _ = drawn()
    one, other = (gptaq(block=block, scales=scales).solve(problem) for block in (N, 8))
    for name in problem.weights:
        codes = one.qtensors[name].codes, other.qtensors[name].codes
        assert (codes[0] != codes[1]).float().mean() < 1e-3


def test_it_comes_nearer_to_the_untouched_output():
    problem, x, a = drawn()

    def error(solver):
        qtensors = solver.solve(problem).qtensors
        return sum(
            float((a @ qtensors[name].dequantize().T - x @ w.T).square().sum())
            for name, w in problem.weights.items()
        )

    moved = [error(gptaq(damp=0.01, propagate_alpha=alpha)) for alpha in (0.0, 0.5, 1.0)]
    assert moved[0] == error(GPTQ(precision="float64"))
    assert moved[0] > moved[1] > moved[2]
    # a price on moving is one on what it gains
    assert error(gptaq(damp=0.01, propagate_alpha=1.0, propagate_damp=10.0)) > moved[2]


def test_many_problems_are_solved_as_each_alone():
    problems = [drawn(seed=seed)[0] for seed in range(3)]
    problems.append(replace(drawn(seed=3)[0], drift=None))
    solver = gptaq(damp=0.01)
    together = solver.solve_together(problems)
    for problem, solution in zip(problems, together):
        alone = solver.solve(problem)
        for name in problem.weights:
            codes = solution.qtensors[name].codes, alone.qtensors[name].codes
            assert (codes[0] != codes[1]).float().mean() < 1e-3


def test_fewer_tokens_than_features_are_damped_until_there_is_a_factor():
    problem, _, _ = drawn(tokens=10)
    undamped, off = gptaq(damp=1.0), gptaq(damp=1.0, propagate_alpha=0.0)
    (name,) = problem.weights.keys() & {"0.w0"}
    moved, still = (each.solve(problem).qtensors[name].codes for each in (undamped, off))
    assert not torch.equal(moved, still)


def test_features_that_are_off_take_no_part():
    problem, x, a = drawn()
    a[:, 5] = 0
    hessian = 2 / len(a) * a.T @ a
    off = replace(problem, hessian=hessian, drift=2 / len(a) * (x - a).T @ a)
    for q in gptaq(damp=0.01).solve(off).qtensors.values():
        assert q.dequantize().isfinite().all()
        assert (q.dequantize()[:, 5] == 0).all()


@pytest.mark.parametrize("solver", [RTN, AWQ])
def test_only_gptq_has_the_loop(solver):
    with pytest.raises(ConfigError, match=r"or solver\.propagate=qep"):
        solver(propagate="gptaq")
