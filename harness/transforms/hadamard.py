"""hadamard: x -> x R at each of the four sites, W <- W R; R block-diagonal with one Hadamard matrix for all blocks.

    R = diag(H_g, ..., H_g)            transform.block_size = g, or `full` for one H_n a site
    R = diag(sigma) R                  transform.random_signs (sigma drawn from (seed, g): fine-grained RHT at g = 16)

Source: FP-Quant `transform_class=hadamard`, MR-GPTQ (arXiv 2509.23202); no norm fusion, no model surgery. Difference: block
`auto` is the largest of 128, 64, 32, 16 that divides every site. Online cost T n log2(g). On NVFP4 with RTN it hurts: a
block of 16 already isolates outliers; it helps INT4 strongly and MXFP4 activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.checks import boolean
from harness.errors import ConfigError
from harness.formats import NVFP4
from harness.linalg.hadamard import Hadamard, factors, random_signs
from harness.transforms.base import Codec, Context, Placement, Transform, generator

BLOCKS = (128, 64, 32, 16)


class HadamardCodec(Codec):
    """E = R, D = R^T: orthogonal, so the reading weight becomes W R."""

    def __init__(self, rotation: Hadamard):
        self.rotation = rotation

    def encode(self, x: Tensor) -> Tensor:
        return self.rotation.apply(x)

    def absorb(self, weight: Tensor) -> Tensor:
        return self.rotation.apply(weight)


class HadamardBlocks(Transform):
    """block_size: auto, full, or an order that divides every site. random_signs: draw sigma. backend: of the fast apply."""

    def __init__(self, block_size: int | str = "auto", random_signs: bool = False, backend: str = "auto"):
        self.block_size, self.backend = block_size, backend
        self.random_signs = boolean("transform.random_signs", random_signs)

    def orders(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The Hadamard order at each site. Raises ConfigError when it does not divide one, or no such matrix is known."""
        if self.block_size == "full":
            orders = dict(widths)
        elif self.block_size == "auto":
            fitting = [g for g in BLOCKS if all(n % g == 0 for n in widths.values())]
            if not fitting:
                raise ConfigError(f"transform.block_size=auto: none of {BLOCKS} divides all of {dict(widths)}; give a number.")
            orders = dict.fromkeys(widths, fitting[0])
        else:
            if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
                raise ConfigError(f"transform.block_size={self.block_size}: needs auto, full, or a whole number.")
            orders = dict.fromkeys(widths, self.block_size)
        for site, order in orders.items():
            if widths[site] % order:
                legal = [g for g in BLOCKS if all(n % g == 0 for n in widths.values())]
                raise ConfigError(
                    f"transform.block_size={order} does not divide site {site} ({widths[site]} features); "
                    f"sizes that divide every site: {', '.join(map(str, legal)) or 'none of ' + str(BLOCKS)}."
                )
            try:
                factors(order)
            except ConfigError as error:
                raise ConfigError(f"transform.block_size={self.block_size}: {error}") from None
        return orders

    def check(self, context: Context) -> list[str]:
        warnings = []
        self.fit(context)  # refuses an unknown or missing backend
        smallest = min(self.orders(context.widths).values())
        weight, act = context.scheme.weight, context.scheme.act
        if isinstance(weight, NVFP4) and isinstance(act, NVFP4):
            warnings.append("transform=hadamard with NVFP4: blocks of 16 isolate outliers; with RTN it is worse than identity")
        for part in (weight, act):
            if part is not None and part.granularity == "group" and smallest < part.group_size:
                warnings.append(f"transform.block_size={smallest} is smaller than the format's group {part.group_size}")
        return list(dict.fromkeys(warnings))

    def fit(self, context: Context) -> Placement:
        sites = {}
        for site, order in self.orders(context.widths).items():
            signs = random_signs(order, generator(context.seed, order)) if self.random_signs else None
            try:
                sites[site] = HadamardCodec(Hadamard(order, signs=signs, backend=self.backend))
            except ConfigError as error:
                raise ConfigError(f"transform.{error}") from None
        return Placement(sites=sites, notes={"block_size": sorted({c.rotation.n for c in sites.values()})})
