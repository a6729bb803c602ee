"""The words every transform speaks: ModelShape, CalibrationModel, Transform.

A ModelShape is what is known before weights are loaded, a CalibrationModel the loaded model with
its calibration text. A transform only *produces* a Placement of codecs; merging them is one act for
all (codecs/fold.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from harness.codecs.placement import Placement, Role, Where
from harness.formats import Format, Scheme
from harness.parallel import Ranks
from harness.structure.structure import Structure

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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


class Collector(Protocol[T_co]):
    """What gathers the activations of one site."""

    def add(self, x: Tensor) -> None:
        """Take in a micro-batch x [..., width]."""
        ...

    def finish(self) -> T_co:
        """What became of them, once all are in."""
        ...


class FloatBlock(Protocol):
    """A block of the loaded model, between what reaches it in float and what it makes of that.

    index: of the block. inputs, targets: hidden states [1, L, hidden] before and after it, one a
    calibration window. train, held: the numbers of windows to learn from, and to choose the best
    iterate by. Of several ranks each has the windows that `Ranks.owns`.
    """

    index: int
    inputs: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]
    train: Tensor
    held: Tensor

    def forward(self, window: int) -> Tensor:
        """The block's output [1, L, hidden] as it is now, within `unmerged` say; differentiable."""
        ...


class CalibrationModel(Protocol):
    """The loaded model, its norms fused if the transform asked for it, and the calibration text.

    train: token ids [N, L] to learn from. held: token ids [M, L], the last tenth, to choose the
    best iterate by. gains: {(layer, site): the norm weight fused there, float64}; empty if none
    was. held_from: the number of the first of `held` among all windows. ranks: the processes that
    learn together, each from the windows whose numbers it owns.
    """

    roles: Mapping[str, Role]
    train: Tensor
    held: Tensor
    device: torch.device
    gains: Mapping[Where, Tensor]
    held_from: int
    ranks: Ranks

    def weight(self, layer: int, linear: str) -> Tensor:
        """The weight [out, in] of a block-relative linear."""
        ...

    def observe(
        self,
        collector: Callable[[int | None, str, int], Collector[T]],
        sites: Iterable[str],
        title: str,
        note: Callable[[dict[Where, T]], str] = ...,
    ) -> dict[Where, T]:
        """Stream the calibration text; {(layer, site): what its collector finished with}.

        collector: (layer, site, width) -> who gathers there; one is filled at a time. note: what
        the progress bar says after each layer, from the results so far.
        """
        ...

    def unmerged(
        self,
        placement: Placement,
        scheme: Scheme | None,
        stored: bool = False,
        layer: int | None = None,
    ) -> AbstractContextManager:
        """Within it, the forward runs with the placement's codecs applied to activations.

        Weights are untouched. With a scheme, activations and KV are quantized by straight-through
        estimators. stored: weights are read as they would be stored, rounded to nearest once they
        are merged, and scales pass gradients. layer: of that block alone.
        """
        ...

    def blocks(self) -> Iterator[FloatBlock]:
        """The blocks in their order, each in memory until the next one is asked for."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, vocabulary]."""
        ...

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> what the output head reads [B, L, hidden]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden`."""
        ...

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """A progress bar; yields `advance(note="")`."""
        ...

    def log(self, values: dict, step: int) -> None:
        """Points of learning curves, `family/metric`.

        Steps count from 1 within a family; of matrices that are learned one after another, from
        the first one's to the last one's.
        """
        ...


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


def weights_at(model: CalibrationModel, layer: int | None, site: str) -> Iterator[Tensor]:
    """The weights [out, width] of the linears of a block that read this site, one at a time."""
    for role in model.roles.values():
        if role.layer is not None and (role.layer, role.reads) == (layer, site):
            yield model.weight(role.layer, role.name)


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded from a key such as (seed, layer, site).

    Draws so do not depend on the order in which places are visited.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    # torch takes a signed 64-bit seed: seven bytes always fit
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
