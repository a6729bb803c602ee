"""hadamard: x -> x R at each of the four sites, W <- W R, one Hadamard matrix for all blocks of R.

    R = diag(H_g, ..., H_g)            transform.block_size = g, or `full` for one H_n a site
    R = diag(sigma) R                  transform.random_signs; sigma drawn from (seed, g), which is
                                       the fine-grained RHT at g = 16

Source: FP-Quant `transform_class=hadamard`, MR-GPTQ (arXiv 2509.23202). Differences: block `auto`,
orders that are no power of two, random signs. Online cost T n log2(g) in the CUDA kernel, T n g as
a matmul. On NVFP4 with RTN it hurts: a block of 16 already isolates outliers; it helps INT4
strongly and MXFP4 activations.
"""

from __future__ import annotations

from harness.codecs.codec import Codec, Rotation
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.formats import NVFP4
from harness.linalg.hadamard import Hadamard, random_signs, reachable
from harness.transforms.base import ModelShape, generator
from harness.transforms.block_diagonal import BlockDiagonal


class HadamardBlocks(BlockDiagonal):
    """block_size: auto, full, or an order that divides every site. random_signs: draw sigma.
    backend: of the fast apply."""

    def __init__(
        self, block_size: int | str = "auto", random_signs: bool = False, backend: str = "auto"
    ):
        super().__init__(block_size)
        self.random_signs = boolean("transform.random_signs", random_signs)
        self.backend = backend

    def refuse(self, order: int) -> None:
        reachable(f"transform.block_size={self.block_size}", order)
        try:  # what a backend demands, it alone knows
            Hadamard(order, backend=self.backend)
        except ConfigError as error:
            raise ConfigError(f"transform.{error}") from None

    def check(self, shape: ModelShape) -> list[str]:
        warnings = super().check(shape)
        if isinstance(shape.scheme.weight, NVFP4) and shape.solver in ("rtn", "minmax"):
            warnings.insert(
                0,
                "transform=hadamard with NVFP4: blocks of 16 isolate outliers; "
                "with RTN it is worse than identity",
            )
        return warnings

    def codec(self, order: int, site: str, seed: int) -> Codec:
        signs = None
        if self.random_signs:
            signs = random_signs(order, generator(seed, order))
        return Rotation(Hadamard(order, signs=signs, backend=self.backend))
