"""Hadamard matrices of every reachable order, and x H without building H.

    H_n = H_K (x) H_{n/K} / sqrt(n),    n/K a power of two (Sylvester),    K = 1 or a Paley order
    R   = diag(sigma) H_n,              sigma in {+-1}^n: the randomized Hadamard transform

Rows are vectors: x -> x R. On X = reshape(x, [a, b]) a Kronecker product acts as
x (A (x) B) = A^T X B; the transpose on A matters, because Paley I is not symmetric.

Write n = m 2^k, m odd; K is 1 for m = 1 and else the smallest 4m 2^j dividing n that Paley's
constructions reach. A fixed cascade of known K (first of 172, 140, ..., 12 that divides) is no
substitute: for 25600 it stops at 40, whose cofactor 640 is no power of two, where K = 100 works.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.linalg.paley import constructible, paley

BACKENDS = ("auto", "kernel", "torch")
DENSE = 256  # up to this order one matmul beats two smaller ones on a CPU
# Orders the CUDA kernel takes. What is no power of two it would pad, and not be orthogonal.
KERNEL = range(8, 32769)


def factors(n: int) -> tuple[int, int]:
    """(K, n / K): the order of the core and of its Sylvester cofactor.

    Raises ConfigError if no matrix of order n can be built; the message lists the divisors of n
    that can serve as blocks.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"the order of a Hadamard matrix must be a positive integer, got {n!r}")
    core = _core(n)
    if core is None:
        legal = [d for d in range(n // 2, 1, -1) if n % d == 0 and _core(d) is not None]
        way_out = "no block size divides it, use a transform that is not Hadamard"
        if legal:
            # small blocks hardly mix: they are named only where there are no others
            blocks = [d for d in legal if d >= 16] or legal
            way_out = f"use blocks: {', '.join(map(str, blocks))}"
        raise ConfigError(f"no Hadamard matrix of order {n} is constructible here; {way_out}")
    return core, n // core


def reachable(field: str, order: int, way_out: str = "") -> None:
    """Raise a ConfigError if no Hadamard matrix has this order.

    field: what the message starts with, as `transform.block_size=12`. way_out: the setting that
    avoids it, where the field takes no block size.
    """
    try:
        factors(order)
    except ConfigError as error:
        reason = str(error)
        if way_out:
            reason = f"{reason.partition(';')[0]}; set {way_out}"
        raise ConfigError(f"{field}: {reason}.") from None


def hadamard(n: int) -> Tensor:
    """The dense H_n, float64 `[n, n]` on the CPU, entries +-1/sqrt(n).

    Raises ConfigError for an unreachable order.
    """
    core, power = factors(n)
    with torch.device("cpu"):
        signs = paley(core) if core > 1 else torch.ones(1, 1, dtype=torch.float64)
        return torch.kron(signs, _sylvester(power)) / math.sqrt(n)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """Independent fair signs, float64 `[n]` of +-1, on the generator's device."""
    bits = torch.randint(2, (n,), generator=generator, device=generator.device, dtype=torch.float64)
    return 2.0 * bits - 1.0


@dataclass(frozen=True, eq=False)
class Hadamard:
    """R = diag(signs) H_n, the same matrix for every block of n along the last axis.

    n: the block order.
    signs: `[n]` of +-1, or None for H_n itself.
    backend: `torch` multiplies by H, in two Kronecker factors if n > 256. `kernel` demands the
        package fast_hadamard_transform and uses it where it applies, on the power-of-two axis of
        CUDA tensors up to float32; the rest stays with `torch`. `auto` is `kernel` without the
        demand.

    Raises ConfigError for an unreachable order, a wrong sign vector, or a missing kernel.
    """

    n: int
    signs: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        factors(self.n)
        if self.signs is not None and (
            self.signs.shape != (self.n,) or not bool((self.signs.abs() == 1).all())
        ):
            raise ConfigError(
                f"signs must be a vector of {self.n} entries +-1, "
                f"got shape {tuple(self.signs.shape)}"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"backend={self.backend!r} is unknown; choose from {', '.join(BACKENDS)}"
            )
        if self.backend == "kernel" and _kernel() is None:
            raise ConfigError(
                "backend='kernel' needs fast-hadamard-transform, which cannot be imported; "
                "use backend='auto'"
            )

    @property
    def steps(self) -> int:
        """Additions a feature of the fast transform: the core's rows and log2 of its cofactor."""
        core, cofactor = factors(self.n)
        dense = core if core > 1 else 0
        return dense + cofactor.bit_length() - 1

    def apply(self, x: Tensor) -> Tensor:
        """x R block by block.

        x: `[..., blocks * n]`, any float dtype; same shape and dtype out, computed in float32 at
        least.

        Raises ConfigError if n does not divide the last dimension.
        """
        rows, signs = self._rows(x)
        if signs is not None:
            rows = rows * signs
        return self._multiply(rows, transpose=False).reshape(x.shape).to(x.dtype)

    def apply_transpose(self, x: Tensor) -> Tensor:
        """x R^T = x R^{-1}; shapes and dtypes as `apply`."""
        rows, signs = self._rows(x)
        product = self._multiply(rows, transpose=True)
        if signs is not None:
            product = product * signs
        return product.reshape(x.shape).to(x.dtype)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """R itself, `[n, n]`, on the CPU."""
        matrix = hadamard(self.n)
        if self.signs is not None:
            matrix = self.signs.to(matrix)[:, None] * matrix
        return matrix.to(dtype)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x as `[rows, n]` in the dtype to compute in, and the signs beside it."""
        if x.shape[-1] % self.n:
            raise ConfigError(
                f"a Hadamard block of {self.n} does not divide the last dimension {x.shape[-1]}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        signs = None if self.signs is None else self.signs.to(x.device, wide)
        return x.to(wide).reshape(-1, self.n), signs

    def _multiply(self, x: Tensor, transpose: bool) -> Tensor:
        """x H or x H^T for x `[rows, n]`, as A^T X B or A X B^T on `[rows, a, b]`."""
        core, power = factors(self.n)
        fits = x.is_cuda and x.dtype != torch.float64 and power in KERNEL
        kernel = _kernel() if fits and self.backend != "torch" else None
        if kernel is not None:
            # Sylvester's factor is symmetric, so the kernel serves both directions
            a, b = core, power
            x = kernel(x.reshape(-1, a, b).contiguous(), 1.0 / math.sqrt(b))
        else:
            a, b = _split(self.n)
            right = _factor(b, x.dtype, x.device)
            x = x.reshape(-1, a, b) @ (right.mT if transpose else right)
        if a > 1:
            left = _factor(a, x.dtype, x.device)
            x = (left if transpose else left.mT) @ x
        return x.reshape(-1, self.n)


@cache
def _core(n: int) -> int | None:
    """The smallest usable K for order n, or None."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    core = 4 * odd  # the least order there can be, as 4 divides all beyond 2
    while n % core == 0:
        if constructible(core):
            return core
        core *= 2
    return None


@cache
def _split(n: int) -> tuple[int, int]:
    """Orders (a, b) of H_n = H_a (x) H_b with the least work a + b per entry.

    (1, n) where one matmul is best.
    """
    _, power = factors(n)
    if n <= DENSE or power == 1:
        return 1, n
    return min(((n // b, b) for b in (2**j for j in range(1, power.bit_length()))), key=sum)


def _sylvester(n: int) -> Tensor:
    """H_{2n} = [[H, H], [H, -H]] from H_1 = 1; float64 `[n, n]` of +-1, n a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=64)
def _factor(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A cached tensor outlives the context it is born in: made under inference mode it could never
    # take part in a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return hadamard(n).to(device, dtype)


@cache
def _kernel() -> Callable[[Tensor, float], Tensor] | None:
    """`hadamard_transform(x, scale)` of fast_hadamard_transform, or None where it cannot be had.

    The import fails without the package, and without its CUDA extension.
    """
    try:
        return import_module("fast_hadamard_transform").hadamard_transform
    except ImportError:
        return None
