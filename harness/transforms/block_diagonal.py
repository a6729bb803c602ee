"""What the block-diagonal transforms share: one matrix a site, the same in every layer.

    x -> x E,  W <- W (E^-1)^T         at each of the four sites
    E = diag(B, ..., B)                B [g, g],  transform.block_size = g, or `full`: one B of the
                                       site's width

Source: the transform classes of FP-Quant, MR-GPTQ (arXiv 2509.23202); no norm fusion, no model
surgery. Differences: block `auto` is the largest of 128, 64, 32, 16 that divides every site
(FP-Quant: 128); the width of o_in is that of o_proj's input, which is not the hidden size in Qwen3.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch

from harness.codecs.codec import Codec
from harness.codecs.placement import Placement, Where
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel

BLOCKS = (128, 64, 32, 16)


class BlockDiagonal(Transform):
    """block_size: auto, full, or an order that divides every site. Nothing here is learned."""

    def __init__(self, block_size: int | str = "auto"):
        self.block_size = block_size

    @abstractmethod
    def codec(self, order: int, site: str, seed: int) -> Codec:
        """The codec of a site, of blocks of that order.

        What it draws comes from a generator keyed by (seed, ..).
        """

    def refuse(self, order: int) -> None:
        """Raise ConfigError, cheaply, if there is no codec of this order."""

    def orders(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The block order at each site.

        Raises ConfigError when it does not divide one, or there is no such matrix.
        """
        orders = self._orders(widths)
        for site, order in orders.items():
            if widths[site] % order:
                raise ConfigError(
                    f"transform.block_size={order} does not divide site {site} "
                    f"({widths[site]} features); {alternatives(common_blocks(widths))}"
                )
            self.refuse(order)
        return orders

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"a matrix at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(shape.widths)

    def check(self, shape: ModelShape) -> list[str]:
        return smaller_than_groups(min(self.orders(shape.widths).values()), shape.scheme)

    def fit(self, shape: ModelShape, model: CalibrationModel | None) -> Placement:
        orders = self.orders(shape.widths)
        # wherever the model lies: the same draws, folded in float64
        with torch.device("cpu"):
            online: dict[Where, Codec] = {
                (None, site): self.codec(order, site, shape.seed) for site, order in orders.items()
            }
        return Placement(online=online, notes={"block_size": sorted(set(orders.values()))})

    def _orders(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The same as the setting has it, whether or not it divides."""
        size = self.block_size
        if size == "full":
            return dict(widths)
        if size == "auto":
            blocks = common_blocks(widths)
            if not blocks:
                raise ConfigError(
                    f"transform.block_size=auto: none of {BLOCKS} divides all of {dict(widths)}; "
                    "give a number."
                )
            return dict.fromkeys(widths, blocks[0])
        # a truth value is an int to Python, too
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"transform.block_size={size}: needs auto, full, or a whole number.")
        return dict.fromkeys(widths, size)


def common_blocks(widths: Mapping[str, int]) -> list[int]:
    """The usual block sizes that divide every site, largest first."""
    return [g for g in BLOCKS if all(n % g == 0 for n in widths.values())]


def smaller_than_groups(order: int, scheme: Scheme) -> list[str]:
    """What is said of blocks that do not mix a whole group of the format."""
    groups = [
        part.group_size
        for part in (scheme.weight, scheme.act)
        if part is not None and part.granularity == "group"
    ]
    return [
        f"transform.block_size={order} is smaller than the format's group {group}"
        for group in dict.fromkeys(groups)
        if group is not None and order < group
    ]


def alternatives(blocks: list[int]) -> str:
    """What a message says of the usual sizes that would do."""
    listed = ", ".join(map(str, blocks)) or f"none of {BLOCKS}"
    return f"sizes that divide every site: {listed}."
