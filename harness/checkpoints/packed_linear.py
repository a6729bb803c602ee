"""A linear in the memory that its checkpoint takes: codes and scales, decoded at every use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.checkpoints.native_tensors import PARTS
from harness.formats import QTensor
from harness.models.quant_linear import QuantLinear


class PackedLinear(QuantLinear):
    """A QuantLinear that keeps codes and scales and makes its weight [out, in] whenever it is used:
    little memory, slow.
    """

    def __init__(self, linear: QuantLinear, quantized: QTensor, dtype: torch.dtype):
        nn.Module.__init__(self)
        for name, tensor in quantized.state().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", linear.bias)
        self.site = linear.site
        self.decoder = linear.decoder
        self.encoder = linear.encoder
        self.format = quantized.format
        self.shape = quantized.shape
        self.stored = quantized.dtype
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        state = {name: getattr(self, name) for name in PARTS if name in self._buffers}
        quantized = QTensor.from_state(self.format, state, self.shape, self.stored)
        return quantized.dequantize().to(self.dtype)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]
