"""Where in the cell of its code a float weight lies.

    w' = v + t (w - v),    t the largest of [0, 1] with Q(w') = v

v: the solved value, w: the weight that was solved. Where the solver rounded to nearest, w' = w;
where it did not (GPTQ moves weights before it rounds them), w' is the point on the way to w at
which the code is still the solver's. Learning from w' begins with the solved model in every bit,
and knows which codes are close to another one. Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.formats import Format, QTensor, Scales, weight_format

HALVINGS = 8  # of the way; what is left of it is too short to matter


def rounded(x: Tensor, format: Format, scales: Scales, dtype: torch.dtype) -> Tensor:
    """x [out, in] on frozen scales, in dtype: what its codes decode to, bit for bit."""
    return format.decode(format.encode(x, scales), scales, dtype)


@torch.no_grad()
def within(weight: Tensor, q: QTensor) -> Tensor:
    """w' [out, in], float32 at least, of the float weight [out, in] that became q."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    format = weight_format(q)
    weight = weight.to(dtype)
    value = format.decode(q.codes, q.scales, dtype)
    way = weight - value
    least = torch.zeros_like(weight)
    most = torch.ones_like(weight)
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        stays = rounded(value + middle * way, format, q.scales, dtype) == value
        least = torch.where(stays, middle, least)
        most = torch.where(stays, most, middle)
    found = value + least * way
    # all of the way, to the last bit
    return torch.where(rounded(weight, format, q.scales, dtype) == value, weight, found)
