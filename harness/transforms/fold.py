"""The one place where matrices are merged into weights: `fold(weights, placement) -> weights`, a pure function.

Called on float64 weights it merges for good (the caller casts back once); called on differentiable weights inside
`torch.func.functional_call` it is part of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.transforms.base import Placement


def fold(weights: Mapping[str, Tensor], placement: Placement, readers: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights with every codec's decoder merged in.

    weights: {name: [out, in]}, any float dtype; readers: {name: the site it reads}. A weight that reads no encoded site is
    returned as it is, not copied. Nothing is changed in place.
    """
    folded = {}
    for name, weight in weights.items():
        codec = placement.site(readers[name]) if name in readers else None
        folded[name] = weight if codec is None else codec.absorb(weight)
    return folded
