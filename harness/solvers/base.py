"""The words every solver speaks: Problem in, Solution out.

A solver turns the weights that read one site into QTensors. It knows nothing of models, files or progress; it returns a
report of plain numbers (damping used, retries, fallbacks) and the pipeline tells people.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.checks import boolean, one_of
from harness.formats import Format, QTensor, Scales


@dataclass(frozen=True)
class Problem:
    """One site: `weights` {name: [out, in]} in model dtype, already transformed; `formats` {name: weight format};
    `hessian` [in, in] float32 of what these weights read, or None when the solver did not ask for it."""

    weights: Mapping[str, Tensor]
    formats: Mapping[str, Format]
    hessian: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """`qtensors` {name: QTensor}, and `report`, plain numbers that hold for the whole site."""

    qtensors: dict[str, QTensor]
    report: dict


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """(weights, statistics, format) -> QTensors. `needs` names the statistics wanted beyond the sample: {"hessian"}.

    sequencing: `sites` = later sites of a block see earlier ones quantized (true-sequential); `block` = one pass a block.
    hessian_input: `fp` = X E, `quantized` = Q(X E), the input as it will be read; `auto` = quantized where a trained decoder
    changes what the weights are for (AdaCodec), else fp. fuse_global_scale: linears of one site
    (q/k/v, gate/up) share a two-level format's global scale, as fused kernels demand.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    sequencing: str = "sites"
    hessian_input: str = "auto"
    fuse_global_scale: bool = True

    def __post_init__(self):
        one_of("solver.sequencing", self.sequencing, ("sites", "block"))
        one_of("solver.hessian_input", self.hessian_input, ("auto", "fp", "quantized"))
        boolean("solver.fuse_global_scale", self.fuse_global_scale)

    def check(self, format: Format) -> list[str]:
        """Refuse a weight format this solver cannot solve for (ConfigError); returns warnings."""
        return []

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """The quantized weights of one site."""

    def static_scales(self, problem: Problem) -> dict[str, Scales]:
        """Each weight's scales by its format's observer, from the weights as they are."""
        scales = {}
        for name, weight in problem.weights.items():
            format = problem.formats[name]
            peers = problem.weights.values() if self.fuse_global_scale else [weight]
            amax = torch.stack([peer.abs().amax() for peer in peers]).amax()
            scales[name] = format.scales(weight, global_scale=format.global_from_amax(amax))
        return scales
