"""Codec: an encoder E before the activation quantizer and a decoder D behind it, x -> Q(x E) D.

What reads the activation absorbs the decoder, W <- W D^T; what writes it can take the encoder,
W <- E^T W, b <- b E. By default D = E^-1, and for an orthogonal E reading is W <- W E (never W E^T,
which a symmetric E would hide). AdaCodec is the codec whose D is free.

    Blocks      E = diag(E_1, .., E_nb), dense for nb = 1
    Rotation    a (randomized) Hadamard matrix, applied fast
    Diagonal    E = diag(1 / s)
    Permutation E = P, the features in another order
    Kronecker   E = L (x) R

Codecs made of these are in composed.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from harness.linalg.blocks import times
from harness.linalg.hadamard import Hadamard


@dataclass(frozen=True, eq=False)
class Codec(ABC):
    """The pair (E, D) of one activation tensor of n features.

    All maps keep the dtype, and are differentiable. twice: of so many leading features of x E the
    quantizer's residual is quantized, too (Format.fake).
    """

    twice = 0  # no annotation: a field only where a codec sets it

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """x E for x [..., n]."""

    @abstractmethod
    def decode(self, y: Tensor) -> Tensor:
        """y D for y [..., n]."""

    @abstractmethod
    def absorb(self, weight: Tensor) -> Tensor:
        """W D^T for a reading weight [out, n], so that (y D) W^T = y (W D^T)^T."""

    @abstractmethod
    def operations(self, width: int) -> int:
        """Multiplications and additions, in pairs, that x E takes for one x of `width` features."""

    def emit(self, weight: Tensor) -> Tensor:
        """E^T W for a writing weight [n, in], so that (x W^T) E = x (E^T W)^T."""
        return self.encode(weight.mT).mT

    def to(self, device: torch.device, dtype: torch.dtype) -> Codec:
        """The same codec with its tensors there."""
        values = {f.name: _moved(getattr(self, f.name), device, dtype) for f in fields(self)}
        return replace(self, **values)


@dataclass(frozen=True, eq=False)
class Blocks(Codec):
    """Block-diagonal matrices.

    encoder: [nb, g, g], or [g, g] for all blocks; None is the identity.
    decoder: may have another shape of these; None is the encoder's transpose.

    Float32 or float64; computed in x's dtype, at least in float32.
    """

    encoder: Tensor | None
    decoder: Tensor | None = None

    def encode(self, x: Tensor) -> Tensor:
        return x if self.encoder is None else times(x, self.encoder)

    def decode(self, y: Tensor) -> Tensor:
        if self.decoder is not None:
            return times(y, self.decoder)
        return y if self.encoder is None else times(y, self.encoder.mT)

    def absorb(self, weight: Tensor) -> Tensor:
        if self.decoder is None:  # D = E^T, so W D^T = W E
            return self.encode(weight)
        return times(weight, self.decoder.mT)

    def operations(self, width: int) -> int:
        return 0 if self.encoder is None else width * self.encoder.shape[-1]


@dataclass(frozen=True, eq=False)
class Rotation(Codec):
    """R of linalg.Hadamard for every block of its order along the last axis."""

    matrix: Hadamard

    def encode(self, x: Tensor) -> Tensor:
        return self.matrix.apply(x)

    def decode(self, y: Tensor) -> Tensor:
        return self.matrix.apply_transpose(y)

    def absorb(self, weight: Tensor) -> Tensor:
        return self.matrix.apply(weight)

    def operations(self, width: int) -> int:
        return width * self.matrix.steps


@dataclass(frozen=True, eq=False)
class Diagonal(Codec):
    """x -> x / s, W -> W diag(s); s [n], nowhere zero."""

    scale: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return (x / self._scale(x)).to(x.dtype)

    def decode(self, y: Tensor) -> Tensor:
        return (y * self._scale(y)).to(y.dtype)

    def absorb(self, weight: Tensor) -> Tensor:
        return self.decode(weight)

    def operations(self, width: int) -> int:
        return width

    def _scale(self, x: Tensor) -> Tensor:
        return self.scale.to(x.device, torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Permutation(Codec):
    """x -> x[.., order]; order [n] int64."""

    order: Tensor
    twice: int = 0

    def encode(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order.to(x.device))

    def decode(self, y: Tensor) -> Tensor:
        return y.index_select(-1, self.order.argsort().to(y.device))

    def absorb(self, weight: Tensor) -> Tensor:
        return self.encode(weight)  # D = P^T

    def operations(self, width: int) -> int:
        return 0  # a gather


@dataclass(frozen=True, eq=False)
class Kronecker(Codec):
    """E = L (x) R, L [l, l], R [r, r], with the decoder L^-1 (x) R^-1.

    On the features reshaped to X [l, r] it is X -> L^T X R.
    """

    left: Tensor
    right: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return self._sides(x, self.left.mT, self.right)

    def decode(self, y: Tensor) -> Tensor:
        return self._sides(y, torch.linalg.inv(self.left).mT, torch.linalg.inv(self.right))

    def absorb(self, weight: Tensor) -> Tensor:
        return self._sides(weight, torch.linalg.inv(self.left), torch.linalg.inv(self.right).mT)

    def operations(self, width: int) -> int:
        return width * (len(self.left) + len(self.right))

    def _sides(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        grid = x.to(dtype).unflatten(-1, (len(left), len(right)))
        return (left.to(grid) @ grid @ right.to(grid)).flatten(-2).to(x.dtype)


def _moved(value: object, device: torch.device, dtype: torch.dtype) -> object:
    """A codec's field with its tensors there; numbers and None stay."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.to(device)  # indices
    if isinstance(value, Tensor | Codec):
        return value.to(device, dtype)
    if isinstance(value, Hadamard) and value.signs is not None:
        return replace(value, signs=value.signs.to(device, dtype))
    if isinstance(value, list | tuple):
        return [_moved(item, device, dtype) for item in value]
    return value
