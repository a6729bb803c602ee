"""What the block-diagonal transforms share: x -> x E at each of the four sites, W <- W (E^-1)^T, E the same in every layer.

    E = diag(B, ..., B)        B [g, g],  transform.block_size = g, or `full`: one B of the site's width

Source: the transform classes of FP-Quant, MR-GPTQ (arXiv 2509.23202); no norm fusion, no model surgery. Differences: block
`auto` is the largest of 128, 64, 32, 16 that divides every site (FP-Quant: 128); the width of o_in is that of o_proj's input,
which is not the hidden size in Qwen3.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch

from harness.codecs.codec import Codec
from harness.codecs.placement import Placement
from harness.config.errors import ConfigError
from harness.transforms.base import CalibrationModel, ModelShape, Transform

BLOCKS = (128, 64, 32, 16)


class BlockDiagonal(Transform):
    """block_size: auto, full, or an order that divides every site. Nothing here is learned."""

    def __init__(self, block_size: int | str = "auto"):
        self.block_size = block_size

    @abstractmethod
    def codec(self, order: int, site: str, seed: int) -> Codec:
        """The codec of a site, of blocks of that order; what it draws comes from a generator keyed by (seed, ..)."""

    def refuse(self, order: int) -> None:
        """Raise ConfigError, cheaply, if there is no codec of this order."""

    def orders(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The block order at each site. Raises ConfigError when it does not divide one, or there is no such matrix."""
        orders = self._chosen(widths)
        for site, order in orders.items():
            if widths[site] % order:
                raise ConfigError(
                    f"transform.block_size={order} does not divide site {site} ({widths[site]} features); "
                    f"sizes that divide every site: {', '.join(map(str, common_blocks(widths))) or 'none of ' + str(BLOCKS)}."
                )
            self.refuse(order)
        return orders

    def leaves(self, context: ModelShape) -> tuple[str, ...]:
        return tuple(f"a matrix at {site}" for site in self.encodes(context))

    def encodes(self, context: ModelShape) -> tuple[str, ...]:
        return tuple(context.widths)

    def check(self, context: ModelShape) -> list[str]:
        smallest = min(self.orders(context.widths).values())
        parts = (context.scheme.weight, context.scheme.act)
        groups = [
            part.group_size for part in parts if part is not None and part.granularity == "group"
        ]
        small = [group for group in dict.fromkeys(groups) if smallest < group]
        return [
            f"transform.block_size={smallest} is smaller than the format's group {group}"
            for group in small
        ]

    def fit(self, context: ModelShape, subject: CalibrationModel | None) -> Placement:
        orders = self.orders(context.widths)
        with torch.device("cpu"):
            online = {
                (None, site): self.codec(order, site, context.seed)
                for site, order in orders.items()
            }
        return Placement(online=online, notes={"block_size": sorted(set(orders.values()))})

    def _chosen(self, widths: Mapping[str, int]) -> dict[str, int]:
        if self.block_size == "full":
            return dict(widths)
        if self.block_size == "auto":
            fitting = common_blocks(widths)
            if not fitting:
                raise ConfigError(
                    f"transform.block_size=auto: none of {BLOCKS} divides all of {dict(widths)}; give a number."
                )
            return dict.fromkeys(widths, fitting[0])
        if (
            isinstance(self.block_size, bool)
            or not isinstance(self.block_size, int)
            or self.block_size < 1
        ):
            raise ConfigError(
                f"transform.block_size={self.block_size}: needs auto, full, or a whole number."
            )
        return dict.fromkeys(widths, self.block_size)


def common_blocks(widths: Mapping[str, int]) -> list[int]:
    """The usual block sizes that divide every site, largest first."""
    return [g for g in BLOCKS if all(n % g == 0 for n in widths.values())]
