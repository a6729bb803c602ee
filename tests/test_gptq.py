"""What GPTQ must satisfy whatever the numbers are."""

import pytest
import torch

from harness.config.errors import ConfigError, DataError
from harness.formats import MX, NVFP4, FourOverSix, Integer, QTensor
from harness.solvers import GPTQ, RTN, Problem

FORMATS = {
    "nvfp4": NVFP4(),
    "fouroversix": FourOverSix(),
    "mxfp4": MX(),
    "int4_group32": Integer(bits=4, granularity="group", group_size=32, symmetric=True),
    "int4_asym_group64": Integer(bits=4, granularity="group", group_size=64, symmetric=False),
    "int4_channel": Integer(bits=4, granularity="channel", group_size=None, symmetric=True),
    "int4_tensor": Integer(bits=4, granularity="tensor", group_size=None, symmetric=True),
    "int4_mse": Integer(bits=4, granularity="group", group_size=32, symmetric=True, observer="mse"),
}
N = 192


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def inputs(tokens=1000, seed=1, dtype=torch.float32):
    """Correlated activations with a few loud channels."""
    x = (
        draw(tokens, N, seed=seed, dtype=torch.float64)
        @ (torch.eye(N) + 0.3 * draw(N, N, seed=2) / N**0.5 * 4).double()
    )
    x[:, ::37] *= 8
    return x.to(dtype)


def hessian(x):
    return 2 / len(x) * x.T @ x


def problem(format, h, rows=(48, 16, 16), dtype=torch.float32):
    weights = {f"w{i}": draw(r, N, seed=10 + i, dtype=dtype) for i, r in enumerate(rows)}
    return Problem(weights, dict.fromkeys(weights, format), h)


def loss(problem, solution, h):
    return sum(
        float(torch.einsum("oi,ij,oj->", d, h.double(), d))
        for d in (
            (problem.weights[n] - q.dequantize()).double() for n, q in solution.qtensors.items()
        )
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_white_inputs_give_rtn(name, scales):
    """H = c I: no column can help another, so every code is the rounded one (static: same scales as
    RTN)."""
    p = problem(FORMATS[name], 3.0 * torch.eye(N))
    got, want = GPTQ(scales=scales).solve(p), RTN().solve(p)
    for n in p.weights:
        assert torch.equal(got.qtensors[n].dequantize(), want.qtensors[n].dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", ["default", "activation"])
def test_better_than_rtn_on_the_inputs(name, order):
    h = hessian(inputs())
    p = problem(FORMATS[name], h)
    solved = GPTQ(order=order).solve(p)
    assert solved.report["fallback"] is None
    assert loss(p, solved, h) < 0.8 * loss(p, RTN().solve(p), h)


@pytest.mark.parametrize("name", ["nvfp4", "int4_group32", "int4_asym_group64"])
def test_dynamic_scales_help_or_match_rtn(name):
    h = hessian(inputs())
    p = problem(FORMATS[name], h)
    assert loss(p, GPTQ(scales="dynamic").solve(p), h) < 0.8 * loss(p, RTN().solve(p), h)


@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["nvfp4", "int4_group32", "int4_channel"])
def test_block_size_does_not_matter(name, scales):
    h = hessian(inputs(dtype=torch.float64))
    p = problem(FORMATS[name], h, dtype=torch.float64)
    a, b = (GPTQ(block=block, scales=scales, precision="float64").solve(p) for block in (N, 8))
    assert loss(p, a, h) == pytest.approx(loss(p, b, h), rel=1e-5)
    for n in p.weights:
        assert (a.qtensors[n].codes != b.qtensors[n].codes).float().mean() < 1e-3


def textbook(w, h, snap, damp=0.01):
    """Column by column, with the inverse and the upper Cholesky factor written out as in the
    paper."""
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, q = w.clone(), torch.empty_like(w)
    for i in range(w.shape[1]):
        q[:, i] = snap(i, w[:, i])
        w[:, i + 1 :] -= torch.outer((w[:, i] - q[:, i]) / u[i, i], u[i, i + 1 :])
    return q


@pytest.mark.parametrize("order", ["default", "activation"])
@pytest.mark.parametrize("name", ["nvfp4", "int4_group32", "int4_channel"])
def test_agrees_with_the_textbook(name, order):
    format, h = FORMATS[name], hessian(inputs(dtype=torch.float64))
    p = problem(format, h, rows=(32,), dtype=torch.float64)
    w = p.weights["w0"]
    scales = format.scales(w, global_scale=format.global_from_amax(w.abs().amax()))
    lattice = [t.expand(len(w), -1) for t in format.lattice(scales)]
    perm = (
        torch.arange(N)
        if order == "default"
        else h.diagonal().argsort(descending=True, stable=True)
    )
    group = format.group(N)

    def snap(i, column):
        return format.snap(
            column.contiguous(), *(t[:, perm[i] // group].contiguous() for t in lattice)
        )

    want = torch.empty_like(w)
    want[:, perm] = textbook(w[:, perm], h[perm][:, perm], snap)
    got = GPTQ(order=order, precision="float64").solve(p).qtensors["w0"].dequantize()
    assert ((got - want).abs() > 1e-5).float().mean() < 2e-3  # a tie may fall to either side
    assert ((w - got) @ h @ (w - got).T).trace() == pytest.approx(
        float(((w - want) @ h @ (w - want).T).trace()), rel=1e-3
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, {"order": "activation"}, {"scales": "dynamic"}], ids=str)
def test_result_lies_on_the_grid_of_its_stored_scales(name, options):
    """Quantizing the result again with the stored scales changes no code, and storing it changes
    no bit."""
    format = FORMATS[name]
    p = problem(format, hessian(inputs()))
    for n, q in GPTQ(**options).solve(p).qtensors.items():
        again = format.quantize(q.dequantize(), scales=q.scales)
        assert torch.equal(again.dequantize(), q.dequantize())
        back = QTensor.from_state(format, q.state(), p.weights[n].shape, p.weights[n].dtype)
        assert torch.equal(back.dequantize(), q.dequantize())


def test_static_reordering_keeps_the_stored_layout():
    """A permutation of the inputs and of the Hessian permutes the result of order=activation
    (channel scales)."""
    h = hessian(inputs(dtype=torch.float64))
    perm = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    p = problem(FORMATS["int4_channel"], h, dtype=torch.float64)
    shuffled = Problem(
        {n: w[:, perm].contiguous() for n, w in p.weights.items()}, p.formats, h[perm][:, perm]
    )
    solver = GPTQ(order="activation", precision="float64")
    a, b = solver.solve(p), solver.solve(shuffled)
    for n in p.weights:
        assert torch.equal(a.qtensors[n].dequantize()[:, perm], b.qtensors[n].dequantize())


def test_linears_solved_together_equal_linears_solved_alone():
    h = hessian(inputs(dtype=torch.float64))
    p = problem(FORMATS["int4_group32"], h, dtype=torch.float64)
    together = GPTQ(precision="float64").solve(p)
    for n in p.weights:
        alone = GPTQ(precision="float64").solve(Problem({n: p.weights[n]}, {n: p.formats[n]}, h))
        same = alone.qtensors[n].codes == together.qtensors[n].codes
        assert same.float().mean() > 0.999


def test_fused_linears_share_the_global_scale():
    p = problem(FORMATS["nvfp4"], hessian(inputs()))
    p.weights["w1"] *= 5
    shared = {float(q.scales.global_scale) for q in GPTQ().solve(p).qtensors.values()}
    alone = {
        float(q.scales.global_scale)
        for q in GPTQ(fuse_global_scale=False).solve(p).qtensors.values()
    }
    assert len(shared) == 1
    assert len(alone) == 3
    assert min(alone) == min(shared)


def test_dead_columns_become_zero():
    x = inputs()
    x[:, [3, 70]] = 0
    p = problem(FORMATS["int4_group32"], hessian(x))
    solved = GPTQ().solve(p)
    assert solved.report["dead_columns"] == 2
    for q in solved.qtensors.values():
        assert not q.dequantize()[:, [3, 70]].any()


@pytest.mark.parametrize("order", ["default", "activation"])
def test_fewer_tokens_than_columns(order):
    x = inputs(tokens=40)
    h = hessian(x)
    p = problem(FORMATS["nvfp4"], h)
    solved = GPTQ(order=order).solve(p)
    assert solved.report["fallback"] is None
    assert loss(p, solved, h) < 0.5 * loss(p, RTN().solve(p), h)


def test_more_damping_is_reported():
    """An indefinite matrix cannot be factored at damp .01; what it took, or the fallback, stands in
    the report."""
    q = torch.linalg.qr(draw(N, N, seed=3, dtype=torch.float64)).Q
    spectrum = torch.ones(N, dtype=torch.float64)
    spectrum[0] = -0.05
    mild = (q * spectrum) @ q.T
    solved = GPTQ().solve(problem(FORMATS["nvfp4"], mild.float()))
    assert solved.report["damp"] == pytest.approx(0.1)
    assert solved.report["fallback"] is None
    p = problem(FORMATS["nvfp4"], -torch.eye(N))
    hopeless = GPTQ().solve(p)
    assert hopeless.report["fallback"] == "rtn"
    for n, q in RTN().solve(p).qtensors.items():
        assert torch.equal(hopeless.qtensors[n].dequantize(), q.dequantize())


@pytest.mark.parametrize("place", [(3, 3), (3, 7)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_refused(place, value):
    h = hessian(inputs())
    h[place] = value
    with pytest.raises(DataError, match="w0"):
        GPTQ().solve(problem(FORMATS["nvfp4"], h))


def test_contradicting_settings_are_refused():
    with pytest.raises(ConfigError, match=r"solver\.scales.*solver\.order"):
        GPTQ(scales="dynamic", order="activation")
    with pytest.raises(ConfigError, match=r"solver\.damp"):
        GPTQ(damp=-1)
    with pytest.raises(ConfigError, match=r"solver\.order"):
        GPTQ(order="actorder")
