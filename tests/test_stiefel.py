import math
from itertools import pairwise

import pytest
import torch

from harness.config.errors import ConfigError
from harness.linalg import stiefel
from harness.linalg.stiefel import CayleySGD, cayley, deviation, project, qr_orth, random_orthogonal

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed: int = 1, dtype=F64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def blocks(n: int, count: int = 3) -> torch.Tensor:
    return torch.stack([random_orthogonal(n, generator(seed)) for seed in range(count)])


def stepped(start: torch.Tensor, gradients, **options) -> torch.Tensor:
    """The parameter after one step per given gradient."""
    x = torch.nn.Parameter(start.clone())
    optimizer = CayleySGD([x], **{"lr": 1e9, **options})
    for gradient in gradients:
        x.grad = gradient.to(x)
        optimizer.step()
    return x.detach()


def drift(n: int, dtype, method: str) -> float:
    """Deviation after 100 random gradients whose steps all end at the cap 1 / ||W||_1."""
    start = random_orthogonal(n, generator()).to(dtype)
    return deviation(stepped(start, gaussian(100, n, n), method=method))


def angles(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The angle of every plane of the rotation from old to new, `[..., n]`."""
    return torch.linalg.eigvals(new @ old.mT).angle().abs()


@pytest.mark.parametrize("n", [2, 5, 16, 64])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-10), (torch.float32, 1e-5)])
def test_exact_steps_stay_orthogonal(n, dtype, tolerance):
    assert drift(n, dtype, "exact") < tolerance


@pytest.mark.parametrize("n", [16, 64])
def test_fixed_point_drifts_more_than_the_solve(n):
    assert drift(n, torch.float32, "fixed_point") < 1e-3
    assert drift(n, F64, "fixed_point") > 1e3 * drift(n, F64, "exact")


def test_project_repairs_the_fixed_point():
    x = stepped(random_orthogonal(4, generator()), gaussian(100, 4, 4), method="fixed_point")
    assert deviation(x) > 1e-4
    assert deviation(project(x)) < 1e-12


@pytest.mark.parametrize("method", ["exact", "fixed_point"])
def test_a_gradient_normal_to_the_group_does_not_move(method):
    """X S with S symmetric changes no length-preserving step: only the skew part of the gradient
    counts."""
    start, gradient, s = random_orthogonal(8, generator()), gaussian(8, 8), gaussian(8, 8, seed=2)
    normal = 100 * start @ (s + s.mT)
    torch.testing.assert_close(
        stepped(start, [normal], lr=1e-2, method=method), start, rtol=0, atol=1e-12
    )
    moved = [stepped(start, [g], lr=1e-2, method=method) for g in (gradient, gradient + normal)]
    torch.testing.assert_close(*moved, rtol=0, atol=1e-12)


def test_fixed_point_approaches_the_solve():
    start, gradient = random_orthogonal(16, generator()), gaussian(1, 16, 16)
    exact, iterated = (
        stepped(start, gradient, lr=1e-2, method=method) for method in stiefel.METHODS
    )
    assert (exact - start).abs().max() > 1e-3
    torch.testing.assert_close(iterated, exact, rtol=0, atol=1e-9)


def test_fixed_point_sums_the_series_of_the_solve():
    """(I - h)^-1 (I + h) = I + 2 (h + h^2 + ...), cut after h^6: the start has the first power,
    each iteration adds one."""
    x, size = random_orthogonal(8, generator()), torch.full((1, 1), 0.1, dtype=F64)
    w = stiefel._skew(x, gaussian(8, 8))
    series = torch.eye(8, dtype=F64) + 2 * sum(
        torch.linalg.matrix_power(w * size / 2, k) for k in range(1, 7)
    )
    torch.testing.assert_close(stiefel._fixed_point(x, w, size), series @ x.T, rtol=0, atol=1e-12)


def test_direction_is_the_projected_gradient():
    x, g = blocks(7), gaussian(3, 7, 7)
    w = stiefel._skew(x, -g.mT)
    assert torch.equal(w, -w.mT)
    riemannian = (g - x @ g.mT @ x) / 2
    torch.testing.assert_close((w @ x.mT).mT, -riemannian, rtol=0, atol=1e-12)
    assert (stiefel._skew(gaussian(7, 7), g[0]).diagonal() == 0).all()


@pytest.mark.parametrize("method", ["exact", "fixed_point"])
@pytest.mark.parametrize("max_angle", [None, 0.1])
def test_zero_lr_does_not_move(method, max_angle):
    start = blocks(6)
    x = stepped(
        start, gaussian(3, 3, 6, 6), lr=0.0, momentum=0.9, method=method, max_angle=max_angle
    )
    torch.testing.assert_close(x, start, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["exact", "fixed_point"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_reaches_a_target_in_its_own_component(method, momentum):
    start = random_orthogonal(12, generator())
    target = cayley(start, 0.1 * gaussian(12, 12))
    x = torch.nn.Parameter(start.clone())
    optimizer = CayleySGD([x], lr=0.3, momentum=momentum, method=method)
    losses = [optimizer.step(lambda: _backward(x, (x - target).square().sum())) for _ in range(60)]
    assert losses[0] > 1 and losses[-1] < 1e-6
    if not momentum:
        assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    assert torch.linalg.det(x.detach()) * torch.linalg.det(start) > 0


def test_momentum_is_the_last_tangent():
    x, first, second = random_orthogonal(8, generator()), *gaussian(2, 8, 8)
    eye, lr, mu = torch.eye(8, dtype=F64), 1e-2, 0.7
    moved = stepped(x, [first, second], lr=lr, momentum=mu)
    momentum = torch.zeros_like(x)
    for gradient in (first, second):
        a = (mu * momentum - gradient.T) @ x
        w = (a - a.T) / 2
        momentum = w @ x.T
        x = (torch.linalg.inv(eye - lr * w / 2) @ (eye + lr * w / 2) @ x.T).T
    torch.testing.assert_close(moved, x, rtol=0, atol=1e-12)


def _backward(x, loss):
    x.grad = None
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", ["exact", "fixed_point"])
def test_a_small_step_descends_at_the_rate_of_the_gradient(seed, method):
    b, c = gaussian(3, 6, 6, seed=seed), gaussian(3, 6, 6, seed=seed + 100)

    def f(x):
        return (torch.tanh(b @ x).square() * c).sum() + torch.sin(x @ c).sum()

    x = torch.nn.Parameter(blocks(6))
    before = _backward(x, f(x))
    slope = -stiefel._skew(x.detach(), -x.grad.mT).square().sum().item()
    CayleySGD([x], lr=1e-6, method=method).step()
    assert (f(x).item() - before) / 1e-6 == pytest.approx(slope, rel=1e-2)
    assert f(x).item() < before


@pytest.mark.parametrize("method", ["exact", "fixed_point"])
@pytest.mark.parametrize("max_angle", [None, 0.2])
def test_batched_equals_looped(method, max_angle):
    start, gradients = (
        blocks(8),
        gaussian(5, 3, 8, 8) * torch.tensor([0.01, 1.0, 100.0], dtype=F64)[:, None, None],
    )
    options = {"lr": 0.5, "momentum": 0.3, "method": method, "max_angle": max_angle}
    batched = stepped(start, gradients, cap="block", **options)
    looped = [stepped(x, gradients[:, i], **options) for i, x in enumerate(start)]
    torch.testing.assert_close(batched, torch.stack(looped), rtol=0, atol=1e-12)
    nested = stepped(start[None], gradients[:, None], cap="block", **options)
    torch.testing.assert_close(nested[0], batched, rtol=0, atol=1e-12)


@pytest.mark.parametrize("theta", [math.inf, 0.2])
def test_tensor_cap_is_the_smallest_block_step(theta):
    w = stiefel._skew(
        blocks(8), gaussian(3, 8, 8) * torch.tensor([0.01, 1.0, 100.0], dtype=F64)[:, None, None]
    )
    per_block, shared = (stiefel._step_size(w, 10.0, cap, theta) for cap in ("block", "tensor"))
    assert per_block.shape == (3, 1, 1) and shared.numel() == 1
    assert shared.item() == per_block.min().item() < per_block.max().item()
    if theta == math.inf:
        assert shared.item() == pytest.approx(1 / w.abs().sum(-2).max().item(), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 16])
@pytest.mark.parametrize("cap", ["tensor", "block"])
def test_no_plane_turns_by_more_than_max_angle(n, cap):
    x = torch.nn.Parameter(blocks(n))
    optimizer = CayleySGD([x], lr=1.0, cap=cap, max_angle=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    largest = []
    for gradient in gaussian(10, 3, n, n) * 1e3:
        x.grad, old, share = gradient, x.detach().clone(), schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        largest.append(angles(old, x.detach()).max().item())
        assert largest[-1] <= 0.05 * share + 1e-6
    assert largest[0] > 0.02
    assert largest[-1] < 0.1 * largest[0]


def test_angle_bound_is_tight_for_one_plane():
    moved = stepped(torch.eye(2, dtype=F64), gaussian(1, 2, 2), max_angle=0.05)
    assert angles(torch.eye(2, dtype=F64), moved).max().item() == pytest.approx(0.05, rel=1e-3)


def test_each_group_keeps_the_lr_of_its_construction():
    first, second = (torch.nn.Parameter(x) for x in blocks(4, 2))
    optimizer = CayleySGD([{"params": [first]}, {"params": [second], "lr": 0.1}], lr=1.5)
    optimizer.param_groups[0]["lr"] = 0.5
    assert [group["base_lr"] for group in optimizer.param_groups] == [1.5, 0.1]
    restored = CayleySGD([{"params": [first]}, {"params": [second]}], lr=9.0)
    restored.load_state_dict(optimizer.state_dict())
    assert [group["base_lr"] for group in restored.param_groups] == [1.5, 0.1]


def test_a_parameter_without_gradient_stays():
    start = blocks(4)
    x = torch.nn.Parameter(start.clone())
    CayleySGD([x], lr=1.0).step()
    assert torch.equal(x.detach(), start)


@pytest.mark.parametrize("options", [{"method": "newton"}, {"cap": "row"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ConfigError, match="choose from"):
        CayleySGD([torch.nn.Parameter(torch.eye(4))], lr=1.0, **options)


def test_rectangles_are_refused():
    with pytest.raises(ConfigError, match="square"):
        CayleySGD([torch.nn.Parameter(torch.eye(4)[:2])], lr=1.0)


def test_autocast_changes_nothing():
    start, gradient = random_orthogonal(16, generator()).float(), gaussian(1, 16, 16)
    noise = gaussian(16, 16, dtype=torch.float32)

    def everything():
        steps = [stepped(start, gradient, method=method) for method in stiefel.METHODS]
        return [
            *steps,
            project(noise),
            qr_orth(noise),
            cayley(start, noise),
            torch.tensor(deviation(start)),
        ]

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = everything()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed))


@pytest.mark.parametrize("n", [2, 16, 64])
def test_qr_orth_returns_an_orthogonal_start(n):
    z = blocks(n, 4)
    torch.testing.assert_close(qr_orth(z), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(qr_orth(z.float()), z.float(), rtol=0, atol=1e-6)
    assert (torch.linalg.qr(z).Q - z).abs().max() > 0.1


def test_qr_orth_of_any_matrix_is_orthogonal():
    z = gaussian(3, 16, 16)
    assert deviation(qr_orth(z)) < 1e-12
    scale = gaussian(16, 16, seed=2).triu(1) + torch.eye(16, dtype=F64) * 2
    torch.testing.assert_close(qr_orth(z @ scale), qr_orth(z), rtol=0, atol=1e-9)
    assert deviation(qr_orth(torch.zeros(4, 4))) < 1e-6


def test_qr_orth_gradient():
    z = torch.nn.Parameter(random_orthogonal(64, generator()).float())
    qr_orth(z).pow(3).sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() > 0
    assert torch.autograd.gradcheck(qr_orth, gaussian(4, 4).requires_grad_())
    assert torch.autograd.gradcheck(qr_orth, gaussian(2, 4, 4).requires_grad_())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_cayley_is_orthogonal_and_keeps_the_component(scale):
    r0 = blocks(16)
    r = cayley(r0, scale * gaussian(3, 16, 16))
    assert deviation(r) < 1e-10
    torch.testing.assert_close(torch.linalg.det(r), torch.linalg.det(r0), rtol=0, atol=1e-9)


def test_cayley_follows_its_formula():
    r0, a = random_orthogonal(8, generator()), gaussian(8, 8)
    s, eye = a - a.mT, torch.eye(8, dtype=F64)
    torch.testing.assert_close(cayley(r0, a), r0 @ torch.linalg.inv(eye + s / 2) @ (eye - s / 2))
    assert torch.equal(cayley(r0, torch.zeros_like(a)), r0)
    assert torch.equal(cayley(r0, a + a.mT), r0)


def test_cayley_gradient():
    r0 = random_orthogonal(4, generator())
    assert torch.autograd.gradcheck(lambda a: cayley(r0, a), gaussian(4, 4).requires_grad_())
    assert torch.autograd.gradcheck(lambda a: cayley(r0, a), gaussian(2, 4, 4).requires_grad_())


def test_project_is_the_nearest_orthogonal_matrix():
    x = gaussian(3, 8, 8)
    nearest = project(x)
    assert deviation(nearest) < 1e-12
    torch.testing.assert_close(project(nearest), nearest, rtol=0, atol=1e-12)
    best = torch.linalg.matrix_norm(nearest - x)
    for seed in range(50):
        random = random_orthogonal(8, generator(seed))
        near = cayley(nearest, 1e-3 * gaussian(8, 8, seed=seed))
        assert (torch.linalg.matrix_norm(random - x) > best).all()
        assert (torch.linalg.matrix_norm(near - x) > best).all()
    assert project(x.float()).dtype == torch.float32


def test_random_orthogonal_is_seeded_and_leaves_the_global_state():
    state = torch.get_rng_state()
    a, b, other = (random_orthogonal(32, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.allclose(a, other)
    assert a.dtype == F64 and deviation(a) < 1e-13


def test_random_orthogonal_is_haar():
    """Haar on O(n): E tr R = 0 and E (tr R)^2 = 1, and both components are equally likely."""
    g, count = generator(), 2000
    r = torch.stack([random_orthogonal(3, g) for _ in range(count)])
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(trace.mean()) < 4 / math.sqrt(count)
    assert trace.square().mean() == pytest.approx(1.0, abs=0.15)
    assert torch.linalg.det(r).mean().abs() < 4 / math.sqrt(count)


def test_deviation_is_the_worst_block():
    x = blocks(4)
    x[1] *= 1.1
    assert deviation(x) == pytest.approx(0.21)
