"""pca: the principal axes of each linear's input, as an online rotation.

    C = 1/N sum (x - m)^T (x - m),    C = V diag(lambda) V^T, lambda descending
    x -> x V,  W <- W V

Eigenvectors in float64; the sign of each column makes its largest entry positive. The mean m only
shifts the estimate of C, it is never subtracted online. post_hadamard: R = V H, which spreads the
variances that V has sorted evenly again; integer activations need it. Every site has an online
dense matmul, T n^2 (`make bench` reports what that adds). scope: per_layer, one R a linear input
(the output head included) | site, one R for that site of all layers. block: R is block-diagonal
with blocks of that size.

Source: the "QuaRot with PCA" system, which calls it QuaRot though it is none. Differences: its
objective |R W R^T - Q(R W R^T)| is two-sided and undefined for rectangular W, so the rotation here
is one-sided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.codecs.codec import Blocks
from harness.codecs.placement import HEAD_SITE, Placement, Where
from harness.config.checks import boolean, integer, one_of
from harness.config.errors import ConfigError
from harness.formats import MX, Integer
from harness.linalg.hadamard import hadamard, reachable
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.sampling import Covariance, Then


class PCA(Transform):
    """scope: per_layer | site. block: null or a size that divides every site. center,
    post_hadamard, head: see above; head says whether the output head's input is rotated too."""

    learned = True
    sees = ()

    def __init__(
        self,
        scope: str = "per_layer",
        block: int | None = None,
        center: bool = True,
        post_hadamard: bool = False,
        head: bool = True,
    ):
        self.scope = one_of("transform.scope", scope, ("per_layer", "site"))
        self.block = integer("transform.block", block, optional=True)
        self.center = boolean("transform.center", center)
        self.post_hadamard = boolean("transform.post_hadamard", post_hadamard)
        self.head = boolean("transform.head", head)

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"a dense matrix at {site}" for site in self._sites(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(shape.widths)

    def check(self, shape: ModelShape) -> list[str]:
        for site, width in shape.widths.items():
            if self.block is not None and width % self.block:
                raise ConfigError(
                    f"transform.block={self.block} does not divide site {site} ({width} features)."
                )
            if self.post_hadamard:
                reachable(
                    "transform.post_hadamard=true",
                    self.block or width,
                    "transform.post_hadamard=false",
                )
        weight = shape.scheme.weight
        act = shape.scheme.act
        warnings = []
        integers = isinstance(weight, Integer) and isinstance(act, Integer) and act.bits <= 4
        if integers and not self.post_hadamard:
            warnings.append(
                "transform=pca with 4-bit integer activations: it sorts variances instead of "
                "evening them out; set transform.post_hadamard=true"
            )
        if isinstance(act, MX):
            warnings.append(
                f"transform=pca with MXFP{act.bits}: sorted variances make whole blocks large; "
                "identity is often as good"
            )
        return warnings

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        axes = self._pooled if self.scope == "site" else self._per_layer
        rotations = axes(model, self._sites(shape))
        return Placement(online={where: Blocks(matrix) for where, matrix in rotations.items()})

    def _sites(self, shape: ModelShape) -> list[str]:
        """The sites of the blocks, and the output head's."""
        head = [HEAD_SITE] if self.head else []
        return [*shape.widths, *head]

    def _per_layer(self, model: CalibrationModel, sites: Sequence[str]) -> Mapping[Where, Tensor]:
        def collector(layer: int | None, site: str, width: int) -> Then[Tensor, Tensor]:
            return Then(Covariance(self.block or width, self.center), self._rotation)

        return model.observe(collector, sites, "principal axes")

    def _pooled(self, model: CalibrationModel, sites: Sequence[str]) -> Mapping[Where, Tensor]:
        pools: dict[str, _Pool] = {}

        def collector(layer: int | None, site: str, width: int) -> _Pool:
            return pools.setdefault(site, _Pool(self.block or width, self.center))

        model.observe(collector, sites, "principal axes")
        return {
            (None, site): self._rotation(pool.covariance.finish()) for site, pool in pools.items()
        }

    def _rotation(self, covariance: Tensor) -> Tensor:
        """V (or V H) of covariances [nb, g, g], float64."""
        axes = principal_axes(covariance)
        if self.post_hadamard:
            axes = axes @ hadamard(axes.shape[-1]).to(axes)
        return axes.cpu()


class _Pool:
    """One covariance of a site of all layers, where no layer is the last."""

    def __init__(self, size: int, center: bool):
        self.covariance = Covariance(size, center)

    def add(self, x: Tensor) -> None:
        self.covariance.add(x)

    def finish(self) -> None:
        pass


def principal_axes(covariance: Tensor) -> Tensor:
    """Orthonormal eigenvectors of [.., g, g] as columns, by decreasing eigenvalue.

    Each has its largest entry positive.
    """
    _, vectors = torch.linalg.eigh(covariance)
    vectors = vectors.flip(-1)  # eigh sorts them by increasing eigenvalue
    # an eigenvector's sign is the library's choice, and would differ between machines
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sign()
