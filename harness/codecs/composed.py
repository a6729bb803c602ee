"""Codecs made of codecs.

Chain       E = E_1 E_2 ..
Repeated    one codec for all query heads of a key/value head
Rows        a codec of some features, the others left alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.codecs.codec import Codec


@dataclass(frozen=True, eq=False)
class Chain(Codec):
    """E = E_1 E_2 .., undone in reverse."""

    codecs: Sequence[Codec]

    @property
    def twice(self) -> int:
        return self.codecs[-1].twice  # the quantizer stands behind the last

    def encode(self, x: Tensor) -> Tensor:
        for codec in self.codecs:
            x = codec.encode(x)
        return x

    def decode(self, y: Tensor) -> Tensor:
        for codec in reversed(self.codecs):
            y = codec.decode(y)
        return y

    def absorb(self, weight: Tensor) -> Tensor:
        for codec in self.codecs:
            weight = codec.absorb(weight)
        return weight

    def operations(self, width: int) -> int:
        return sum(codec.operations(width) for codec in self.codecs)


@dataclass(frozen=True, eq=False)
class Repeated(Codec):
    """A codec of the kv_heads * head_dim values, as the heads that read them see it.

    Query head j sees key/value head j // repeat, so features [kv_heads, repeat, head_dim] are taken
    as `repeat` rows of the codec's own.
    """

    codec: Codec
    kv_heads: int
    repeat: int

    def encode(self, x: Tensor) -> Tensor:
        return self._heads(self.codec.encode, x)

    def decode(self, y: Tensor) -> Tensor:
        return self._heads(self.codec.decode, y)

    def absorb(self, weight: Tensor) -> Tensor:
        return self._heads(self.codec.absorb, weight)

    def operations(self, width: int) -> int:
        return self.repeat * self.codec.operations(width // self.repeat)

    def _heads(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.kv_heads, self.repeat, -1)).transpose(-3, -2)
        return apply(heads.flatten(-2)).view(heads.shape).transpose(-3, -2).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Rows(Codec):
    """A codec of the features `rows`, in that order; the others stay as they are.

    Of a fused projection only some outputs are values.
    """

    codec: Codec
    rows: Sequence[int]

    def encode(self, x: Tensor) -> Tensor:
        return self._rows(self.codec.encode, x)

    def decode(self, y: Tensor) -> Tensor:
        return self._rows(self.codec.decode, y)

    def absorb(self, weight: Tensor) -> Tensor:
        return self._rows(self.codec.absorb, weight)

    def operations(self, width: int) -> int:
        return self.codec.operations(len(self.rows))

    def _rows(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        rows = torch.tensor(self.rows, device=x.device)
        return x.index_copy(-1, rows, apply(x.index_select(-1, rows)))
