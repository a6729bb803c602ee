"""What kind of norm a module is, found by trying it on random rows.

    rms    y = x / sqrt(mean x^2) * g            layer  y = (x - mean x) / std x * g + b

The gain g may be the weight w, 1 + w, or 1 where there is none. No class or module name is looked
at: a norm that this project has never seen is recognized like any other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 64
ACCURACY = 1e-3  # norms compute in float32 whatever they are given; their eps costs about 1e-5


@dataclass(frozen=True)
class NormKind:
    """kind: rms | layer. gain: w | 1+w | 1. bias: whether something is added after the gain."""

    kind: str
    gain: str
    bias: bool


def norm_kind(module: nn.Module, width: int) -> NormKind | None:
    """The kind of a module that maps rows [.., width] to normalized ones; None: it is no norm.

    A copy with random weights is tried on the CPU, so that neither the device nor the values of the
    module's own matter.
    """
    if list(module.children()) or any(p.ndim > 1 for p in module.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        trial = trial.to_empty(device="cpu")
    trial = trial.cpu().float()
    for parameter in trial.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 + 0.2 * values
    x = torch.randn(ROWS, width, generator=generator) + 0.1
    try:
        with torch.no_grad():
            y = trial.forward(x.clone())
    except Exception:  # it wants other arguments, and is no norm
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return _classified(x.double(), y.double(), getattr(trial, "weight", None))


def _classified(x: Tensor, y: Tensor, weight: Tensor | None) -> NormKind | None:
    """The kind of y [rows, n] as a function of x [rows, n]."""
    centred = x - x.mean(-1, keepdim=True)
    candidates = {
        "rms": x / x.square().mean(-1, keepdim=True).sqrt(),
        "layer": centred / centred.square().mean(-1, keepdim=True).sqrt(),
    }
    for kind, z in candidates.items():
        # least squares of y = z g + b, feature by feature
        spread = z - z.mean(0)
        gain = (spread * (y - y.mean(0))).sum(0) / spread.square().sum(0)
        bias = (y - z * gain).mean(0)
        if (y - z * gain - bias).abs().max() > ACCURACY * y.abs().max():
            continue
        convention = _convention(gain, weight)
        if convention is not None:
            return NormKind(kind, convention, bool(bias.abs().max() > ACCURACY))
    return None


def _convention(gain: Tensor, weight: Tensor | None) -> str | None:
    """How a gain [n] follows from the module's weight."""
    gains = {"1": torch.ones_like(gain)}
    if weight is not None and weight.shape == gain.shape:
        gains |= {"w": weight.detach().double(), "1+w": 1 + weight.detach().double()}
    for name, values in gains.items():
        if (gain - values).abs().max() < 2 * ACCURACY * gain.abs().max():
            return name
    return None
