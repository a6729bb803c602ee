"""Descent over orthogonal matrices: Cayley SGD, and two maps from free parameters onto the group.

Cayley SGD, for X `[n, n]`, G = dL/dX and a skew W:

    V = mu M - G^T,    A = V X,    H = A - X^T X A / 2,    W = H - H^T
    a = min(lr, 1 / ||W||_1, theta / b(W)),    b(W) = min(||W||_1, ||W||_F / sqrt 2) >= ||W||_2
    Y = (I - a W / 2)^-1 (I + a W / 2) X^T,    X <- Y^T,    M <- W X^T with the old X

QR-Orth and the Cayley parametrization:

    R(Z) = Q sign(diag T),    Z = Q T the QR decomposition
    R(A) = R0 (I + S / 2)^-1 (I - S / 2),    S = A - A^T

The curve moves X^T, so W is built from -G^T. On orthogonal X, W is the skew part of -G^T X, and at
a = 0 the loss changes at the rate <G^T, W X^T> = -||W||_F^2 in a: a small step descends. W has
eigenvalues +-i w, and a step turns the plane of such a pair by 2 atan(a w / 2) <= a w; so
a b(W) <= theta keeps every plane below theta radians. b is a bound because the singular values of a
skew matrix come in equal pairs. A Cayley step keeps det X: what is learned stays in the component
it starts in.

Sources: Li, Fuxin, Todorovic (arXiv 2002.01113) for Cayley SGD, SpinQuant (arXiv 2405.16406) for
its use on rotations, DartQuant (arXiv 2511.04063) for QR-Orth. Differences: Y comes from a linear
solve, five fixed-point iterations are an option; they start at X^T + a W X^T as in the paper, where
SpinQuant's code starts at X^T + a V and drifts ten times as far for n <= 64. SpinQuant normalises
the rows before every step; here only the fixed point does, the solve has no need. Nothing retracts
at random, see `project`. The bound theta is ours: 1 / ||W||_1 alone lets a step turn by almost a
radian. DartQuant's code omits the sign, so that its rotation starts with flipped columns.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from harness.config.errors import ConfigError

METHODS = ("exact", "fixed_point")
CAPS = ("tensor", "block")
ITERATIONS = 5
EPS = 1e-8  # for the norms of W where the gradient vanishes


class CayleySGD(torch.optim.Optimizer):
    """SGD along the Cayley curve, in place, for orthogonal matrices: parameters `[..., n, n]`.

    lr: the largest step; a scheduler may change it.
    momentum: mu.
    method: `exact` solves; `fixed_point` needs only matmuls, but at the step cap its X leaves the
        group (|X X^T - I| after 100 steps: 1e-2 for n = 2, 4e-5 for n = 16), so `project` it.
    cap: `tensor` gives all blocks of a parameter the step of the stiffest one, `block` gives each
        its own.
    max_angle: theta in radians at the lr of construction, which the group keeps as `base_lr`; theta
        scales with lr from there.

    Raises ConfigError for an unknown method or cap, or a parameter that is not square.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.0,
        method: str = "exact",
        cap: str = "tensor",
        max_angle: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "method": method,
            "cap": cap,
            "max_angle": max_angle,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", group["lr"])
        for name, choices in (("method", METHODS), ("cap", CAPS)):
            if group[name] not in choices:
                raise ConfigError(
                    f"{name}={group[name]!r} is unknown; choose from {', '.join(choices)}"
                )
        for x in group["params"]:
            if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
                raise ConfigError(
                    f"Cayley SGD needs square matrices [..., n, n], got shape {tuple(x.shape)}"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    with _full_precision(x):
                        self._update(x, x.grad, group)
        return loss

    def _update(self, x: Tensor, gradient: Tensor, group: dict) -> None:
        rows = x
        curve = _exact
        if group["method"] == "fixed_point":
            rows = torch.nn.functional.normalize(x, dim=-1)
            curve = _fixed_point
        theta = math.inf
        if group["max_angle"] is not None:
            # an lr of 0 at construction takes no step, whatever the angle
            theta = group["max_angle"] * group["lr"] / (group["base_lr"] or 1.0)
        momentum = group["momentum"] * self.state[x].get("momentum_buffer", 0.0)
        w = _skew(rows, momentum - gradient.mT)
        y = curve(rows, w, _step_size(w, group["lr"], group["cap"], theta))
        if group["momentum"]:
            self.state[x]["momentum_buffer"] = w @ rows.mT
        x.copy_(y.mT)


@torch.no_grad()
def project(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to x in the Frobenius norm, its polar factor.

    x: `[..., n, n]`; computed in float64.
    """
    with _full_precision(x):
        u, _, vh = torch.linalg.svd(x.double())
        return (u @ vh).to(x.dtype)


def qr_orth(z: Tensor) -> Tensor:
    """R(Z), `[..., n, n]`, equal to Z for orthogonal Z.

    The gradient needs full rank; a zero on diag T counts as positive.
    """
    with _full_precision(z):
        q, t = torch.linalg.qr(z)
        signs = torch.where(t.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(z.dtype)
        return q * signs.unsqueeze(-2)


def cayley(r0: Tensor, a: Tensor) -> Tensor:
    """R0 (I + S/2)^-1 (I - S/2) for the skew S = A - A^T of any `[..., n, n]` A; R0 at A = 0."""
    with _full_precision(a):
        half = (a - a.mT) / 2
        eye = _eye(a)
        return r0 @ torch.linalg.solve(eye + half, eye - half)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 `[n, n]` on the generator's device."""
    # Without the sign fix QR of a Gaussian is not Haar: LAPACK's choice of reflections leaves a
    # bias in the diagonal.
    gaussian = torch.randn(n, n, generator=generator, device=generator.device, dtype=torch.float64)
    return qr_orth(gaussian)


@torch.no_grad()
def deviation(x: Tensor) -> float:
    """max |X X^T - I| over all blocks of `[..., n, n]`, in float64."""
    with _full_precision(x):
        x = x.double()
        return (x @ x.mT - _eye(x)).abs().max().item()


def _skew(x: Tensor, v: Tensor) -> Tensor:
    """W for the matrices x and the direction v, a step in x^T."""
    a = v @ x
    h = a - x.mT @ (x @ a) / 2
    return h - h.mT


def _step_size(w: Tensor, lr: float, cap: str, theta: float) -> Tensor:
    """a, `[..., 1, 1]` or, for cap `tensor`, `[1, 1]`."""
    # ||W||_1; a skew matrix has the same ||W||_inf
    norm = w.abs().sum(-2).amax(-1)
    spectral = torch.minimum(norm, w.square().sum((-2, -1)).sqrt() / math.sqrt(2.0))
    size = torch.minimum(1.0 / (norm + EPS), theta / (spectral + EPS)).clamp(max=lr)
    if cap == "tensor":
        size = size.amin()
    return size[..., None, None]


def _exact(x: Tensor, w: Tensor, size: Tensor) -> Tensor:
    half = size / 2 * w
    eye = _eye(w)
    return torch.linalg.solve(eye - half, (eye + half) @ x.mT)


def _fixed_point(x: Tensor, w: Tensor, size: Tensor) -> Tensor:
    half = size / 2 * w
    start = x.mT
    y = start + 2 * half @ start
    for _ in range(ITERATIONS):
        y = start + half @ (start + y)
    return y


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _full_precision(x: Tensor) -> AbstractContextManager:
    # bfloat16 products under a caller's autocast would cost orthogonality its last five digits.
    return torch.autocast(x.device.type, enabled=False)
