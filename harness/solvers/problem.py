"""What is asked of a solver, and what it answers: Problem in, Solution out.

A problem is one site: the weights that read one activation, and what was seen of it. Where nobody
asked for a statistic it is None, so that no solver pays for another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.formats import Format, QTensor, Scales


@dataclass(frozen=True)
class Problem:
    """One site.

    weights: {name: [out, in]} in model dtype, already transformed. formats: {name: weight format}.
    hessian: float32 of what these weights read, [in, in] or, where no more was asked for, blocks of
    its diagonal [in / k, k, k]; None when the solver did not ask for it. scales: {name: Scales}
    where they are decided already. drift: [in, in] float32, 2/N sum (x_f - x)^T x where x_f is what
    they read in the untouched model; None where nobody asked for it. origins: {name: [out, in]}
    what acts on x_f there, not encoded, where a decoder is free and these are not `weights`. peaks:
    {name: greatest magnitude []} of those that share a global scale, where these are but some of
    them.
    """

    weights: Mapping[str, Tensor]
    formats: Mapping[str, Format]
    hessian: Tensor | None = None
    scales: Mapping[str, Scales] | None = None
    drift: Tensor | None = None
    origins: Mapping[str, Tensor] | None = None
    peaks: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Solution:
    """qtensors: {name: QTensor}. report: plain numbers that hold for the whole site."""

    qtensors: dict[str, QTensor]
    report: dict
