"""QuantLinear, the only module swapped into a model, and SiteInput, which feeds it.

    y = Q_a(x E) W_q^T + b

Of the first k features that a codec says are quantized `twice`, Q_a(z) = Q(z) + Q(z - Q(z)): the
product of n + k features in which the residual of z meets the first k columns of W_q again.

x E and Q_a belong to the site, not to the linear: q, k and v read one tensor, so it is encoded and
quantized once. While a transform is learned nothing is merged, and the decoders run on activations
too (models/unmerged.py): y = Q_a(x E) D W^T + b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.formats import Format
from harness.transforms import Codec


class Quantizer(Protocol):
    """What quantizes an activation while something learns by it."""

    def fake(self, x: Tensor, ste: bool = False, global_scale: Tensor | None = None) -> Tensor:
        """x [..., n] quantized and dequantized."""
        ...


class SiteInput(nn.Module):
    """Encode, then quantize, an activation [..., n] for all `readers` linears that read it.

    decoder: undoes the encoding for every reader, where it is not merged into their weights.
    ranged: stands in for the format while its ranges are learned.
    """

    global_scale: Tensor | None

    def __init__(self, readers: int):
        super().__init__()
        self.readers = readers
        self.codec: Codec | None = None
        self.format: Format | None = None
        self.ranged: Quantizer | None = None
        self.decoder: Codec | None = None
        self.register_buffer("global_scale", None)
        # the latest activation and its result, kept until the last reader has had it
        self._seen: Tensor | None = None
        self._read: Tensor | None = None
        self._left = 0

    def encode(self, x: Tensor) -> Tensor:
        """x E, before any quantizer: what a solver's statistics see."""
        return x if self.codec is None else self.codec.encode(x)

    @property
    def twice(self) -> int:
        """k, the leading features of x E that are quantized twice."""
        return 0 if self.codec is None else self.codec.twice

    def forward(self, x: Tensor) -> Tensor:
        if self._seen is not x:
            # rotations and rounding have a precision of their own
            with torch.autocast(x.device.type, enabled=False):
                y = self.encode(x)
                ste = torch.is_grad_enabled()
                if self.ranged is not None:
                    y = self.ranged.fake(y, ste, self.global_scale)
                elif self.format is not None:
                    y = self.format.fake(y, ste, self.global_scale, self.twice)
                if self.decoder is not None:
                    y = self.decoder.decode(y)
            self._seen = x
            self._read = y
            self._left = self.readers
        read = self._read
        assert read is not None
        self._left -= 1
        if self._left == 0:
            self._seen = self._read = None
        return read


class QuantLinear(nn.Module):
    """A linear that reads its site, with a weight [out, in] dequantized from a QTensor, or float.

    decoder and encoder: of this linear alone, on its input and output, where they are not merged
    into its weight. rounding: what its weight becomes before it is read, while a transform
    learns from weights as they will be stored. keeps: whether `load` leaves the weight that was
    there before in `solved`.
    """

    weight: Tensor
    bias: Tensor | None
    rounding: Callable[[Tensor], Tensor] | None = None  # of every subclass, however it is built

    def __init__(self, weight: Tensor, bias: Tensor | None, site: SiteInput):
        super().__init__()
        # buffers, not parameters: they take no gradient
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.site = site
        self.decoder: Codec | None = None
        self.encoder: Codec | None = None
        self.keeps = False
        self.solved: Tensor | None = None

    @property
    def in_features(self) -> int:
        """n, the features it reads."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """The features it writes."""
        return self.weight.shape[0]

    def held(self, bits: int) -> int:
        """Bits of a weight of `bits` with its first k columns repeated, (1 + k / n) times as many.

        k: what its site quantizes twice.
        """
        return bits + bits * self.site.twice // self.in_features

    def load(self, values: Tensor) -> None:
        """Take dequantized values [out, in] into the weight's own memory."""
        if self.keeps:
            self.solved = self.weight.clone()
        self.weight.copy_(values)  # and no new tensor, so that the model is in memory once

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x)
        if self.decoder is not None:
            x = self.decoder.decode(x)
        # made anew at each forward: weights may lie on disk between two
        weight = self.weight if self.rounding is None else self.rounding(self.weight)
        y = nn.functional.linear(x, weight, self.bias)
        return y if self.encoder is None else self.encoder.encode(y)
