"""Transform, and ModelShape, what one may know before weights are loaded.

The loaded model with its text, from which a transform is fitted, is in calibration_model.py. A
transform only *produces* a Placement of codecs; merging them is one act for all (codecs/fold.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from harness.codecs.placement import Placement
from harness.formats import Format, Scheme
from harness.structure.structure import Structure
from harness.transforms.calibration_model import CalibrationModel


@dataclass(frozen=True)
class ModelShape:
    """What a transform may look at before any weight is loaded.

    widths: {site: features}. layers, heads, kv_heads, head_dim: of the attention blocks. scheme:
    the formats. seed: the run's. solver: its name; None where weights stay float. readers: {site:
    its linears}. structure: where all this comes from.
    """

    widths: Mapping[str, int]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scheme: Scheme
    seed: int
    solver: str | None = None
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    structure: Structure | None = None

    def reads(self, site: str, layer: int | None) -> Format | None:
        """The format in which the linears of a site read their activation, one tensor for all."""
        first, *_ = self.readers.get(site) or ("",)
        return self.scheme.part("act", layer, first)

    def quantizes(self, site: str) -> bool:
        """Whether the activation of this site is quantized in any layer."""
        return any(self.reads(site, layer) is not None for layer in range(self.layers))

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.widths["attn_in"] if self.structure is None else self.structure.hidden

    def merges(self, site: str) -> tuple[int, ...]:
        """The blocks in which what stands before a site can take a scale."""
        if self.structure is None:
            return tuple(range(self.layers))
        return self.structure.merges(site)

    @property
    def turns(self) -> tuple[int, ...]:
        """The blocks in which what makes attention's values can take a matrix of each head."""
        return tuple(range(self.layers)) if self.structure is None else self.structure.turns

    def widths_of(self, site: str) -> dict[int | None, int]:
        """{block: features} of a site; {None: features} where all blocks have the same."""
        if self.structure is None:
            return {None: self.widths[site]}
        sites = {layer: self.structure.site(site, layer) for layer in range(self.layers)}
        widths: dict[int | None, int] = {
            layer: found.width for layer, found in sites.items() if found is not None
        }
        alike = len(set(widths.values())) == 1
        return {None: self.widths[site]} if alike else widths

    @property
    def key_dim(self) -> int:
        """Features of a query or key in one head."""
        if self.structure is None:
            return self.head_dim
        return next(iter(self.structure.attention.values())).features[0]

    @property
    def fixes_ones(self) -> bool:
        """Whether a rotation of the residual stream has to leave the vector of ones alone."""
        return self.structure is not None and self.structure.residual.group == "fixes 1"


class Transform(ABC):
    """Produces a Placement.

    name: of the option it was built from, for messages.
    exact: the function of the model must not change (the gate holds it to that).
    residual: the residual stream is rotated, so the head is untied and norms are fused first.
    fixes_ones: it can leave the vector of ones alone, as norms that subtract the mean demand.
    learned: fitting costs so much that its result is stored.
    free_decoder: quantized inputs are not those of the original weights, so a Hessian has to see
        them quantized.
    sees: the parts of the format that change what is learned.
    unread: settings without effect as the others are set.
    """

    name: str = "transform"
    exact: bool = True
    residual: bool = False
    fixes_ones: bool = False
    learned: bool = False
    free_decoder: bool = False
    sees: tuple[str, ...] = ("act", "kv")
    unread: tuple[str, ...] = ()

    def check(self, shape: ModelShape) -> list[str]:
        """Refuse what cannot work (ConfigError), before any weight is loaded.

        Returns warnings for the result table.
        """
        return []

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        """What cannot be merged and stays online, in words; others' checkpoints cannot hold it."""
        return ()

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        """Sites of the blocks before which an encoder runs, so that their feeders take no scale."""
        return ()

    @property
    def whole(self) -> bool:
        """Whether it learns through the whole model, which has to be in memory then."""
        return self.learned and "act" in self.sees

    @property
    def structure(self) -> dict[str, object]:
        """The settings that a stored placement must share, to be loaded under these."""
        return {}

    def settled(self, shape: ModelShape) -> tuple[object, ...]:
        """What of the format changes what is learned besides the parts it sees: what an `auto`
        comes to."""
        return ()

    def complete(self, shape: ModelShape, placement: Placement) -> Placement:
        """A stored placement with what this run wants besides (R3 and R4 of the rotations)."""
        return placement

    @abstractmethod
    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        """The matrices of this transform."""


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded from a key such as (seed, layer, site).

    Draws so do not depend on the order in which places are visited.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    # torch takes a signed 64-bit seed: seven bytes always fit
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
