"""The words every transform speaks: Codec, Placement, Transform.

A codec puts an encoder E before the activation quantizer and a decoder D behind it, `x -> Q(x E) D`. The decoder is
merged into the reading weight, `W <- W D^T`; by default D = E^-1, and for an orthogonal E that is `W <- W E`.
A transform only *produces* codecs; merging them is one act for all (fold.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.formats import Scheme


class Codec(ABC):
    """The pair (E, D) of one activation tensor of n features."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """x E for x [..., n], in x's dtype."""

    @abstractmethod
    def absorb(self, weight: Tensor) -> Tensor:
        """W D^T for a reading weight [out, n], in its dtype (float64 when merging for good)."""


@dataclass(frozen=True)
class Placement:
    """Codecs keyed by where they sit; `sites[name]` holds for that site of every block.

    `notes` are facts the choice settled (a block size picked by `auto`); they stand in the result.
    """

    sites: Mapping[str, Codec] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)

    def site(self, name: str) -> Codec | None:
        """The codec at a site, or None where the activation is read as it is."""
        return self.sites.get(name)


@dataclass(frozen=True)
class Context:
    """What a transform may look at: `widths` {site: features}, the formats, and the run's seed."""

    widths: Mapping[str, int]
    scheme: Scheme
    seed: int


class Transform(ABC):
    """Produces a Placement. `exact` says that the function of the model must not change (the gate holds it to that)."""

    exact: bool = True

    def check(self, context: Context) -> list[str]:
        """Refuse what cannot work (ConfigError), before any weight is loaded; returns warnings for the result table."""
        return []

    @abstractmethod
    def fit(self, context: Context) -> Placement:
        """The matrices of this transform."""


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded from a key such as (seed, layer, site), so that draws do not depend on visiting order."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
