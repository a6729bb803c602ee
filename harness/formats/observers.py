"""Observers: the range of each group, from its extremes or from a grid search over shrunken ranges.

    minmax   the extremes themselves
    mse      argmin over p_i of sum |dq(x; p_i * range) - x|^norm, per group; of equals the first

| preset                                     | shrink | maxshrink | grid | patience | expand |
| QuaRot, SpinQuant, FlatQuant, LightCompress | range  | 0.8       | 100  | null     | 1.0    |
| FP-Quant                                   | scale  | 0.8       | 100  | null     | 1.0    |
| LLM Compressor memoryless_mse              | range  | 0.2       | 100  | 5        | 1.0    |
| LLM Compressor nvfp4_expanded_mse          | range  | 0.555     | 200  | 1000     | 1.8    |
| ModelOpt mse (norm 2)                      | range  | 0.963     | 40.533 | null   | 4.0    |

`range` shrinks both ends of the range through p_i = expand * (1 - i / grid), i < maxshrink * grid.
`scale` shrinks only the step, through p_i = expand * (1 - maxshrink * i / grid), i < grid, so an
asymmetric group keeps its lower end (where zero points are codes: as long as its zero point is
one). Patience counts steps in which no group of the tensor improved, so a result with patience
depends on the tensor's extent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from harness.config.checks import integer, known_keys, number, one_of
from harness.config.errors import ConfigError


@dataclass(frozen=True)
class MSE:
    """Knobs of the grid search (table above).

    norm: exponent of the error. Raises ConfigError on values outside their range.
    """

    maxshrink: float = 0.8
    grid: float = 100
    norm: float = 2.4
    patience: int | None = None
    shrink: str = "range"
    expand: float = 1.0

    def __post_init__(self):
        number("mse.maxshrink", self.maxshrink, 0, 1)
        number("mse.grid", self.grid, 1, 1e6)
        number("mse.norm", self.norm, 0, 100)
        integer("mse.patience", self.patience, optional=True)
        one_of("mse.shrink", self.shrink, ("range", "scale"))
        number("mse.expand", self.expand, 0, 100)

    @classmethod
    def of(cls, knobs: Mapping, field: str) -> "MSE":
        """From a mapping of knobs that stands at `field`.

        ConfigError for one that does not exist or is out of range.
        """
        known_keys(f"{field}.", knobs, [f.name for f in fields(cls)])
        try:
            return cls(**knobs)
        except ConfigError as error:
            raise ConfigError(str(error).replace("mse", field, 1)) from None

    @property
    def factors(self) -> list[float]:
        """The shrink factors p_i in the order they are tried."""
        if self.shrink == "range":
            count = int(self.maxshrink * self.grid)
            return [self.expand * (1 - i / self.grid) for i in range(count)]
        count = int(self.grid)
        return [self.expand * (1 - i * self.maxshrink / self.grid) for i in range(count)]


def absmax(blocks: Tensor) -> Tensor:
    """max |x| over the last axis; NaN wins."""
    if blocks.dtype != torch.float32:
        return blocks.abs().amax(-1)
    # Floats without their sign bit order like integers (NaN above Inf), and the integer reduction
    # is the faster one.
    return blocks.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1).view(torch.float32)


def error(x: Tensor, dq: Tensor, norm: float) -> Tensor:
    """sum |dq - x|^norm over the last axis."""
    return (dq - x).abs_().pow_(norm).sum(-1)


def search(
    x: Tensor,
    start: tuple[Tensor, ...],
    candidates: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    mse: MSE,
) -> tuple[Tensor, ...]:
    """Parameters of least error per group.

    x: [*lead, groups, group]. start: parameters [*lead, groups] kept where no candidate has a
    finite error. candidates yields (parameters, dq), dq of x's shape. Returns a tuple like start.
    """
    best = start
    # no error of NaN compares as less, so none replaces the start
    least = torch.full_like(start[0], torch.inf, dtype=x.dtype)
    idle = 0
    for parameters, dq in candidates:
        e = error(x, dq, mse.norm)
        better = e < least
        least = torch.where(better, e, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(parameters, best))
        if mse.patience is None:  # and no need to wait for the device to ask whether any is better
            continue
        idle = 0 if better.any() else idle + 1
        if idle >= mse.patience:
            break
    return best
