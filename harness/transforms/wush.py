"""wush: the block matrices that make the error of quantizing both sides least, in closed form.

    x -> x E,   W <- W D^T                     per site and block of g features,  D = E^-1
    min over E of  tr(E^T C_x E) tr(D C_w D^T),    C_x = E[x^T x],   C_w = E[w^T w]

    C_x = B B^T  (Cholesky),    B^T C_w B = V S^2 V^T
    E = B^-T V S^(1/2) H_g,     D = H_g^T S^(-1/2) V^T B^T

Both sides get the same second moments, E^T C_x E = D C_w D^T = H^T S H, which H_g makes flat, and
the product of their traces is its minimum, the squared nuclear norm |B^T C_w^(1/2)|_*^2. C_w is
over the rows of all linears of the site, experts' too. C_x is damped by `damp` of its mean
diagonal, S by `damp` of its mean: few tokens leave C_x singular, and E D = I in any case.

E is not orthogonal: scales of activations grow and shrink by design, the float model stays. share:
E for engines that hold one matrix, from the mean of C_x and of C_w over a site's blocks, or over
its blocks of all layers; in bfloat16, as they hold it, with D its inverse. merge: the matrix of
attention's output goes into the values where these take one of each head, the same for all query
heads of a value head (C_x and C_w are their mean). Before down stands a product, which only a
diagonal passes, before the others a norm: they stay online, T n g each.

Source: WUSH (arXiv 2512.00956). Differences: S is damped, too; share and merge.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.placement import Placement, Where
from harness.config.checks import boolean, number, one_of
from harness.config.errors import ConfigError
from harness.linalg.hadamard import hadamard, reachable
from harness.transforms.base import ModelShape, Transform
from harness.transforms.block_diagonal import alternatives, common_blocks, smaller_than_groups
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.pca import principal_axes
from harness.transforms.sampling import Covariance, Then

Moments = tuple[Tensor, Tensor]  # C_x and C_w [nb, g, g], or [g, g] of all blocks, float64


class Wush(Transform):
    """block_size: auto (the group of activations, else of weights, else the largest of 128, 64, 32,
    16 that divides every site) or a number. damp, share, merge: see above."""

    learned = True
    sees = ()  # but for the group that `auto` takes

    def __init__(
        self,
        block_size: int | str = "auto",
        damp: float = 0.01,
        share: str = "none",
        merge: bool = False,
    ):
        self.block_size = block_size
        self.damp = number("transform.damp", damp, 1e-6, 1)
        self.share = one_of("transform.share", share, ("none", "blocks", "site"))
        self.merge = boolean("transform.merge", merge)

    @property
    def structure(self) -> dict[str, object]:
        return {"share": self.share, "merge": self.merge}

    def settled(self, shape: ModelShape) -> tuple[object, ...]:
        return (self.order(shape),)

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"a matrix at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(site for site in shape.widths if site != "o_in" or not self._merges(shape))

    def check(self, shape: ModelShape) -> list[str]:
        g = self.order(shape)
        reachable(f"transform.block_size={g}", g)
        if self.merge and not shape.turns:
            raise ConfigError(
                "transform.merge=true: no block of this model has values that take a matrix of "
                "each head; set transform.merge=false."
            )
        if self.merge and shape.head_dim % g:
            raise ConfigError(
                f"transform.merge=true: blocks of {g} do not divide a head's {shape.head_dim} "
                "values; set transform.merge=false, or a transform.block_size that does."
            )
        return smaller_than_groups(g, shape.scheme)

    def order(self, shape: ModelShape) -> int:
        """g.

        Raises ConfigError where it does not divide a site, or there is none to choose.
        """
        size = self.block_size
        blocks = common_blocks(shape.widths)
        if size == "auto":
            size = next(iter([*_groups(shape), *blocks]), None)
        # a truth value is an int to Python, too
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(
                f"transform.block_size={self.block_size}: needs a whole number, or auto where the "
                f"format has groups; {alternatives(blocks)}"
            )
        for site in shape.widths:
            for width in shape.widths_of(site).values():
                if width % size:
                    raise ConfigError(
                        f"transform.block_size={size} does not divide site {site} ({width} "
                        f"features); {alternatives(blocks)}"
                    )
        return size

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        moments = self._moments(shape, model)
        if self.share == "site":
            moments = _pooled(moments)
        online: dict[Where, Codec] = {}
        merged: dict[Where, Codec] = {}
        for (layer, site), (inputs, weights) in moments.items():
            into = merged if self._takes(shape, layer, site) else online
            into[layer, site] = self._codec(inputs, weights)
        notes = {"block_size": self.order(shape)}
        return Placement(online=online, merged=merged, notes=notes)

    def _moments(self, shape: ModelShape, model: CalibrationModel) -> dict[Where, Moments]:
        """C_x and C_w of every site, averaged over what shares a matrix within a layer."""
        g = self.order(shape)

        def collector(layer: int | None, site: str, width: int) -> Then[Tensor, Moments]:
            # a router reads its site as it is, so it is none of those that absorb D
            readers = [
                role
                for role in model.roles.values()
                if role.swapped and (role.layer, role.reads) == (layer, site)
            ]
            weights = Covariance(g, center=False)
            for role in readers:
                assert role.layer is not None  # a site of a block, as all of them are
                weights.add(model.weight(role.layer, role.name))
            heads = readers[0].heads if self._takes(shape, layer, site) else None

            def both(inputs: Tensor) -> Moments:
                return self._shared(inputs, heads), self._shared(weights.finish(), heads)

            return Then(Covariance(g, center=False), both)

        return model.observe(collector, [*shape.widths], "second moments")

    def _shared(self, moments: Tensor, heads: tuple[int, int] | None) -> Tensor:
        """[nb, g, g] averaged over the query heads of each value head, heads: (value heads, query
        heads on each), or over all blocks."""
        if self.share != "none":
            return moments.mean(0)
        if heads is None:
            return moments
        return moments.unflatten(0, (*heads, -1)).mean(1).flatten(0, 1)

    def _codec(self, inputs: Tensor, weights: Tensor) -> Blocks:
        """E and D for C_x and C_w."""
        encoder, decoder = closed_form(inputs, weights, self.damp)
        if self.share != "none":
            encoder = encoder.bfloat16().double()
            decoder = torch.linalg.inv(encoder)
        return Blocks(encoder.cpu(), decoder.cpu())

    def _takes(self, shape: ModelShape, layer: int | None, site: str) -> bool:
        """Whether a site's matrix goes into the values."""
        return self.merge and site == "o_in" and layer in shape.turns

    def _merges(self, shape: ModelShape) -> bool:
        """Whether no block has a matrix online before attention's output projection."""
        having = [
            layer
            for layer in range(shape.layers)
            if shape.structure is None or shape.structure.site("o_in", layer) is not None
        ]
        return all(self._takes(shape, layer, "o_in") for layer in having)


def closed_form(inputs: Tensor, weights: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(E, D) for inputs C_x and weights C_w [.., g, g], float64."""
    root = torch.linalg.cholesky(_damped(inputs, damp))
    product = root.mT @ weights @ root
    axes = principal_axes(product)
    # of what is positive semidefinite, but for rounding
    s = (axes * (product @ axes)).sum(-2).clamp_min(0).sqrt()
    s = s + damp * _scale(s)
    flat = hadamard(s.shape[-1]).to(s)
    columns = s.sqrt()[..., None, :]
    encoder = torch.linalg.solve_triangular(root.mT, axes * columns, upper=True) @ flat
    decoder = flat.mT @ (axes / columns).mT @ root.mT
    return encoder, decoder


def _damped(moments: Tensor, damp: float) -> Tensor:
    """C + damp mean(diag C) I."""
    level = damp * _scale(moments.diagonal(dim1=-2, dim2=-1))
    return moments + torch.diag_embed(level.expand(moments.shape[:-1]))


def _scale(values: Tensor) -> Tensor:
    """The mean over the last axis, kept; 1 of features that are never on."""
    mean = values.mean(-1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)


def _pooled(moments: Mapping[Where, Moments]) -> dict[Where, Moments]:
    """Every layer's replaced by the mean over all layers."""
    by_site: dict[str, list[Moments]] = {}
    for (_, site), pair in moments.items():
        by_site.setdefault(site, []).append(pair)
    means = {}
    for site, pairs in by_site.items():
        inputs, weights = (torch.stack(each).mean(0) for each in zip(*pairs))
        means[site] = (inputs, weights)
    return {(layer, site): means[site] for layer, site in moments}


def _groups(shape: ModelShape) -> list[int]:
    """Elements a scale of activations, then of weights, where they have groups."""
    parts = [part for part in (shape.scheme.act, shape.scheme.weight) if part is not None]
    grouped = [part.group_size for part in parts if part.granularity == "group"]
    return [size for size in grouped if size is not None]
