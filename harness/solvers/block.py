"""What a solver sees that looks beyond one site: a decoder block, and the text that reaches it.

A block is a Protocol: calibration/block.py is one, of a model, and solvers know no more than this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from harness.formats import Format
from harness.parallel import Ranks


@dataclass(frozen=True)
class Part:
    """A micro-batch as a part of a batch. index: of the micro-batch; rows: its windows among those
    of the batch; share: how much of the batch they are."""

    index: int
    rows: slice
    share: float


class Block(Protocol):
    """One decoder block with the calibration activations before it.

    For solvers that look beyond one site. A micro-batch of hidden states is [B, L, hidden];
    `quantized[i]` came through the solved blocks, `original[i]` through untouched ones. A batch of
    windows, on which one step is taken, is one micro-batch of one process; `ranks` share its
    windows, and each has micro-batches of its own.
    """

    index: int  # of the block in the model
    formats: Mapping[str, Format]  # {name: weight format} of those to be quantized
    sites: Mapping[str, tuple[str, ...]]  # {site: its linears} in the order of the forward
    original: Sequence[Tensor]
    targets: Sequence[Tensor]  # what the untouched block makes of `original`
    ranks: Ranks

    @property
    def batches(self) -> Sequence[Sequence[Part]]:
        """The parts of each batch that this rank has, if any."""
        ...

    def draws(self, batch: int) -> list[Tensor]:
        """Of each such part, a number of [0, 1) for every element of its hidden states.

        Seeded by the run and the block, the next ones at each call: all ranks have to call.
        """
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """{name: [out, in]} of all linears, model dtype."""
        ...

    @property
    def quantized(self) -> Sequence[Tensor]:
        """What came through the solved blocks."""
        ...

    def forward(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output for the hidden states of micro-batch `index`, differentiable.

        weights: those of some linears, in place of the block's.
        """
        ...

    def inputs(self, site: str) -> Tensor:
        """What a site reads of the first micro-batches, [tokens, n], in the unquantized block."""
        ...

    def parent(
        self, site: str, weights: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """What the module around a site makes of these inputs, with some weights replaced.

        That is attention, MLP, or the last linear itself. With a scale s [n], the site's activation
        is read as Q_a(x / s) s.
        """
        ...

    def merge(self, site: str, scale: Tensor) -> None:
        """Divide a site's activation by s [n] for good: 1/s into what feeds it, s into readers."""
        ...

    def scalable(self, site: str) -> str:
        """`free`: every feature may have a scale of its own; `shared`: query heads share those of
        their value head; `fixed`: what feeds the site cannot take a scale."""
        ...

    def share(self, site: str, values: Tensor) -> Tensor:
        """values [n] averaged over the features that must share a scale."""
        ...

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """A progress bar; yields `advance(note="")`."""
        ...

    def log(self, values: dict, step: int) -> None:
        """Points of learning curves, `family/metric`; steps count from 1 within a family, from
        block to block."""
        ...
