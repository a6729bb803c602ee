"""What affine learns: a site's invertible matrices and ratios of ranges, and their steps.

    E from Invertibles (linalg/invertible.py), so that E^-1 is known;   c in [2^-6, 1] of each range

The sites that learn together have one AdamW, whose rate falls to 0 by a cosine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.codecs.codec import Codec
from harness.codecs.placement import Placement, Where
from harness.linalg.invertible import Invertible

LEAST = 2.0**-6  # ratio of a range


class Matrices(nn.Module):
    """What is learned of the features of one site, whose matrices are all in `Invertible`s."""

    @abstractmethod
    def online(self) -> Codec:
        """What encodes the activation."""

    def merged(self) -> Codec | None:
        """What encodes it before, and goes into what feeds the site."""
        return None

    def condition(self) -> float:
        """The greatest condition number."""
        return max(m.condition() for m in self.modules() if isinstance(m, Invertible))


class Site(nn.Module):
    """The matrices of a site, and the ratios of its ranges: of {linear: parts} that have any.

    Parameters are 1 - c, zero at first: one for the activation, one for each weight.
    """

    def __init__(self, where: Where, matrices: Matrices, clips: Mapping[str, Sequence[str]]):
        super().__init__()
        self.where = where
        self.matrices = matrices
        self.clips = clips
        self.shrunk = nn.Parameter(torch.zeros(1 + len(clips)), requires_grad=bool(clips))

    def ratios(self) -> dict[Where, dict[str, Tensor]]:
        """{(layer, linear): {part: c []}}."""
        act, *weights = (1 - self.shrunk).unbind()
        return {
            (self.where[0], linear): {
                part: {"act": act, "weight": weight}[part] for part in self.clips[linear]
            }
            for linear, weight in zip(self.clips, weights)
        }

    @torch.no_grad()
    def confine(self) -> None:
        """Bring the ratios back to (0, 1]."""
        self.shrunk.clamp_(0, 1 - LEAST)


class Moving:
    """The sites that learn together under one optimizer."""

    def __init__(self, sites: Sequence[Site], lr: float, steps: int):
        self.sites = sites
        self.modules = nn.ModuleList(sites)
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps))

    def step(self) -> None:
        """One step along the gradients gathered since the last."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        for site in self.sites:
            site.confine()

    def leaves(self) -> list[nn.Parameter]:
        """The tensors whose gradients are gathered."""
        return list(self.modules.parameters())

    def snapshot(self) -> dict[str, Tensor]:
        """The parameters now, as copies."""
        return {name: value.clone() for name, value in self.modules.state_dict().items()}


def placed(
    sites: Sequence[Site], notes: Mapping[str, object] | None = None, final: bool = False
) -> Placement:
    """Where the matrices go. final: with ratios as numbers, but for those that stayed 1."""
    merged = {site.where: site.matrices.merged() for site in sites}
    clips = {where: ratios for site in sites for where, ratios in site.ratios().items()}
    if final:
        numbers = {
            where: {part: float(c) for part, c in ratios.items() if c < 1}
            for where, ratios in clips.items()
        }
        clips = {where: ratios for where, ratios in numbers.items() if ratios}
    return Placement(
        merged={where: codec for where, codec in merged.items() if codec is not None},
        online={site.where: site.matrices.online() for site in sites},
        clips=clips,
        notes=notes or {},
    )
