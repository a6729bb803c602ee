"""CalibrationModel: the loaded model and its calibration text, from which a transform is fitted.

Activations reach a transform in three ways: gathered site by site (Collector), block by block with
gradients (FloatBlock), or through the whole model. calibration/subject.py is one, of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from harness.codecs.placement import Placement, Role, Where
from harness.formats import Scheme
from harness.parallel import Ranks

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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


def weights_at(model: CalibrationModel, layer: int | None, site: str) -> Iterator[Tensor]:
    """The weights [out, width] of the linears of a block that read this site, one at a time."""
    for role in model.roles.values():
        if role.layer is not None and (role.layer, role.reads) == (layer, site):
            yield model.weight(role.layer, role.name)
