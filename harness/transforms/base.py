"""The words every transform speaks: ModelShape, CalibrationModel, Transform.

ModelShape is what is known before weights are loaded, CalibrationModel the loaded model under study.
A transform only *produces* a Placement of codecs; merging them is one act for all (codecs/fold.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from harness.codecs.placement import Placement, Role
from harness.formats import Format, Scheme


@dataclass(frozen=True)
class ModelShape:
    """What a transform may look at before any weight is loaded: `widths` {site: features}, the shape of the attention
    heads, the formats, the solver's name (None: weights stay float), the run's seed, `readers` {site: its linears}."""

    widths: Mapping[str, int]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scheme: Scheme
    seed: int
    solver: str | None = None
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def reads(self, site: str, layer: int) -> Format | None:
        """The format in which the linears of a site read their activation; all of them read one tensor."""
        first, *_ = self.readers.get(site) or ("",)
        return self.scheme.part("act", layer, first)

    def quantizes(self, site: str) -> bool:
        """Whether the activation of this site is quantized in any layer."""
        return any(self.reads(site, layer) is not None for layer in range(self.layers))

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.widths["attn_in"]


class CalibrationModel(Protocol):
    """The loaded model, its norms fused if the transform asked for it, and the calibration text."""

    roles: Mapping[str, Role]
    train: Tensor  # token ids [N, L] to learn from
    held: Tensor  # token ids [M, L], the last tenth, to choose the best iterate by
    device: torch.device
    gains: Mapping[
        tuple[int | None, str], Tensor
    ]  # (layer, site) -> the norm weight fused there, float64; empty if none was

    def weight(self, layer: int, linear: str) -> Tensor:
        """The weight [out, in] of a block-relative linear."""

    def observe(
        self,
        collector: Callable,
        sites: Iterable[str],
        title: str,
        note: Callable[[dict], str] = ...,
    ) -> dict[tuple[int | None, str], object]:
        """Stream the calibration text; at each (layer, site) `collector(layer, site, width)` gets `.add(x)` for every
        micro-batch x [..., width] and its `.finish()` is returned. One site's collector is filled at a time. note: what the
        progress bar says after each layer, from what was found so far."""

    def unmerged(self, placement: Placement, scheme: Scheme | None) -> AbstractContextManager:
        """Within it, the forward runs with the placement's codecs applied to activations (weights untouched) and, with a
        scheme, with activations and KV quantized by straight-through estimators."""

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, vocabulary]."""

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> what the output head reads [B, L, hidden]."""

    def head(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden`."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """A progress bar; yields `advance(note="")`."""

    def log(self, values: dict, step: int) -> None:
        """Points of learning curves, `family/metric`; steps count from 1 within a family, of matrices that are learned one
        after another from the first one's to the last one's."""


class Transform(ABC):
    """Produces a Placement.

    name: of the option it was built from, for messages. exact: the function of the model must not change (the gate holds it to
    that). residual: the residual stream is rotated, so the head is untied and norm weights are fused first. learned: fitting
    costs so much that its result is stored. free_decoder: quantized inputs are not those of the original weights, so a
    Hessian has to see them quantized. sees: the parts of the format that change what is learned. unread: settings
    without effect as the others are set.
    """

    name: str = "transform"
    exact: bool = True
    residual: bool = False
    learned: bool = False
    free_decoder: bool = False
    sees: tuple[str, ...] = ("act", "kv")
    unread: tuple[str, ...] = ()

    def check(self, context: ModelShape) -> list[str]:
        """Refuse what cannot work (ConfigError), before any weight is loaded; returns warnings for the result table."""
        return []

    def leaves(self, context: ModelShape) -> tuple[str, ...]:
        """What cannot be merged and stays online, in words; a checkpoint for others cannot hold it."""
        return ()

    def encodes(self, context: ModelShape) -> tuple[str, ...]:
        """Sites of the blocks before which an encoder runs, so that what feeds them takes no scale."""
        return ()

    @property
    def structure(self) -> dict[str, object]:
        """What of the settings a stored placement must have been made with, to be loaded under them."""
        return {}

    def complete(self, context: ModelShape, placement: Placement) -> Placement:
        """A stored placement with what this run wants beside the learned matrices (R3 and R4 of the rotations)."""
        return placement

    @abstractmethod
    def fit(self, context: ModelShape, subject: CalibrationModel) -> Placement:
        """The matrices of this transform."""


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded from a key such as (seed, layer, site), so that draws do not depend on visiting order."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
