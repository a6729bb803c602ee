"""Hadamard cores that are not powers of two, by the two constructions of Paley.

Let chi be the quadratic character of GF(q) (0 at 0, 1 at squares, -1 elsewhere) and
Jac[i, j] = chi(a_i - a_j).

    I   q = K - 1   = 3 mod 4    not symmetric
                                 H = I + [[0, 1], [-1, Jac]]
    II  q = K/2 - 1 = 1 mod 4    symmetric
                                 H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
                                 C = [[0, 1], [1, Jac]]

q may be a prime power p^k, k <= 3: GF(p^k) is the ring of polynomials over GF(p) modulo an
irreducible of degree k, and up to degree 3 a polynomial without a root is irreducible. Everything
is computed, so no table of signs has to be trusted.

Source: R. E. A. C. Paley, J. Math. Phys. 12, 1933.
"""

import itertools
from functools import cache

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p prime and 1 <= k <= 3; None if there is no such pair."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    return next(((p, k) for k in (1, 2, 3) if p**k == q), None)


def constructible(order: int) -> bool:
    """Whether Paley I or II gives a Hadamard matrix of this order."""
    return _first(order) is not None or _second(order) is not None


@cache
def paley(order: int) -> Tensor:
    """The Paley matrix of this order, construction I where both exist.

    Do not write to it, the result is shared.

    Returns float64 `[order, order]` of +-1 with H H^T = order * I. Raises ValueError if
    `constructible(order)` is false.
    """
    first = _first(order)
    second = _second(order)
    # A cached tensor outlives the context it is born in, so neither inference mode nor a default
    # device may mark it.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        if first is not None:
            return _eye(order) + _bordered(_jacobsthal(*first), -1.0)
        if second is None:
            raise ValueError(f"order {order} has no Paley construction over GF(p^k), k <= 3")
        conference = _bordered(_jacobsthal(*second), 1.0)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, pair) + torch.kron(_eye(order // 2), diagonal)


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _first(order: int) -> tuple[int, int] | None:
    """(p, k) of construction I."""
    return prime_power(order - 1) if order % 4 == 0 else None


def _second(order: int) -> tuple[int, int] | None:
    """(p, k) of construction II."""
    q = order // 2 - 1
    return prime_power(q) if order % 4 == 0 and q % 4 == 1 else None


def _bordered(jacobsthal: Tensor, sign: float) -> Tensor:
    """[[0, 1], [sign, Jac]] for a `[q, q]` Jac."""
    q = len(jacobsthal)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = sign
    bordered[1:, 1:] = jacobsthal
    return bordered


def _jacobsthal(p: int, k: int) -> Tensor:
    """chi(a_i - a_j) over GF(p^k), float64 `[q, q]`.

    Element a_i has the base-p digits of i as its coefficients.
    """
    q = p**k
    place = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // place % p
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(_squares(digits, p) * place).sum(-1)] = 1.0
    character[0] = 0.0
    # indices of the elements a_i - a_j: coefficients subtract each by itself, modulo p
    difference = sum((digits[:, None, d] - digits[None, :, d]) % p * p**d for d in range(k))
    return character[difference]


def _squares(digits: Tensor, p: int) -> Tensor:
    """The square of every field element; coefficients `[q, k]`, lowest degree first, in and out."""
    k = digits.shape[1]
    product = torch.zeros(len(digits), 2 * k - 1, dtype=torch.int64)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += digits[:, i] * digits[:, j]
    modulus = torch.tensor(_irreducible(p, k))
    # from the top down, x^degree = x^(degree - k) (-c_0 - .. - c_{k-1} x^{k-1}) takes its place
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree] -= product[:, degree : degree + 1] * modulus
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Coefficients c_0 to c_{k-1} of a monic x^k + ... + c_0 without a root in GF(p).

    For k = 1 it is x itself, which needs no such property.
    """
    if k == 1:
        return (0,)

    def has_root(c: tuple[int, ...]) -> bool:
        return any((x**k + sum(c[d] * x**d for d in range(k))) % p == 0 for x in range(p))

    return next(c for c in itertools.product(range(p), repeat=k) if not has_root(c))
