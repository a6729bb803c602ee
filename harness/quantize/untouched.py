"""The model as it was before anything was merged, beside the one that is quantized.

Where a decoder is free (AdaCodec: x E D is not x), the transformed model is another one, and what
its weights are for is not told by it: a site reads x_f of the untouched model, and its linears are
to give

    x_f W_o^T,    W_o = E_w^T W

with W as it was and E_w what a linear's output is encoded by (the residual stream, values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.codecs.placement import Placement
from harness.models.adapter import Adapter


@dataclass(frozen=True)
class Untouched:
    """adapter: a swapped model, which nobody changes. placements: what was merged into the other,
    in their order."""

    adapter: Adapter
    placements: Sequence[Placement]

    def origin(self, name: str) -> Tensor:
        """W_o [out, in] of the linear of that absolute name, in the weight's dtype."""
        weight = self.adapter.model.get_submodule(name).weight
        role = self.adapter.roles[name]
        written = weight.double()
        for placement in self.placements:
            codec = placement.writing(role)
            if codec is not None:
                written = codec.emit(written)
        return written.to(weight.dtype)
