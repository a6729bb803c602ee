"""The gradients of a loss whose terms are spread over ranks.

    dL / dx = sum over ranks of  dL_r / dx,     L = sum L_r

All ranks have the same sum, in every bit, and so take the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.parallel.ranks import Ranks


def add_gradients(leaves: Sequence[Tensor], ranks: Ranks) -> None:
    """Make each gradient the sum of all ranks'; a tensor for which none has one stays without."""
    having = ranks.gather([leaf.grad is not None for leaf in leaves])
    gradients = []
    for leaf, has in zip(leaves, map(any, zip(*having))):
        if not has:
            continue
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        gradients.append(leaf.grad)
    ranks.sum_(*gradients)
