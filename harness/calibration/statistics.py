"""What a solver may know of a site's activation: Hessian, largest magnitude, a sample of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.formats import Format
from harness.parallel import ALONE, Ranks
from harness.solvers.base import Solver

# Columns of X^T X computed at a time: wide enough for the matmul, narrow enough to skip half of the
# square.
PANEL = 384
SAMPLE_ROWS = 256  # a sample has at least so many, where there are


class Statistics:
    """Running statistics of one site over the calibration tokens, of which each rank sees a share.

    They are those of all ranks once `finish()` was called.

    hessian: [n, n] float32, `2/N sum x^T x` once `finish()` was called; the blocks of its diagonal
        [n / k, k, k] where k, the `curvature` that is wanted, is less than n; None where that is 0.
    range: [2] float32, least and greatest value (with 0).
    drift: [n, n] float32, `2/N sum (x_f - x)^T x` once `finish()` was called, with x as the Hessian
        sees it; None where `add` was never given x_f, what the untouched model has there.
    sample: every k-th token's row [s, n] float32, at least 256 where there are so many, for
        measuring output errors. reference: the same rows of x_f, or the sample itself.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        device: torch.device | str,
        curvature: int,
        ranks: Ranks = ALONE,
    ):
        self.hessian = None
        if curvature:
            blocks = () if curvature == width else (width // curvature,)
            self.hessian = torch.zeros(*blocks, curvature, curvature, device=device)
        self.ranks = ranks
        self.range = torch.zeros(2, device=device)
        self.tokens = 0
        self._stride = max(1, tokens // SAMPLE_ROWS)
        # zeros: each rank fills its rows, and they are added up
        self._sample = torch.zeros(-(-tokens // self._stride), width, device=device)
        self.drift: Tensor | None = None
        self._reference: Tensor | None = None

    def add(
        self,
        x: Tensor,
        product_of: Tensor | None = None,
        untouched: Tensor | None = None,
        start: int | None = None,
    ) -> None:
        """Take in activations [..., n]; the Hessian sees `product_of` instead, where given.

        untouched: what the same tokens have there in the untouched model. start: the row of the
        whole text with which they begin; None: they follow on those before.
        """
        x = x.reshape(-1, x.shape[-1])
        low, high = torch.aminmax(x)
        low = torch.minimum(self.range[0], low)
        high = torch.maximum(self.range[1], high)
        self.range = torch.stack([low, high]).float()
        # every `_stride`-th row of the whole text, wherever a micro-batch begins
        start = self.tokens if start is None else start
        first = -(-start // self._stride)
        kept = slice(first * self._stride - start, None, self._stride)
        rows = x[kept]
        self._sample[first : first + len(rows)] = rows
        if untouched is not None:
            self._compare(x if product_of is None else product_of, untouched, first, kept)
        self.tokens += len(x)
        if self.hessian is not None:
            z = x.float() if product_of is None else product_of.reshape(x.shape).float()
            if self.hessian.ndim == 3:
                parts = z.unflatten(-1, self.hessian.shape[:2]).transpose(0, 1)
                self.hessian.baddbmm_(parts.mT, parts)
                return
            for lo in range(0, z.shape[1], PANEL):
                # the product is symmetric: each panel of rows stops at its own diagonal block
                hi = lo + PANEL
                self.hessian[lo:hi, :hi].addmm_(z[:, lo:hi].T, z[:, :hi])

    def compares(self) -> None:
        """To be called before the first `add` where each is to be given what the untouched model
        has."""
        width = self._sample.shape[1]
        self.drift = torch.zeros(width, width, device=self._sample.device)
        self._reference = torch.zeros_like(self._sample)

    def _compare(self, x: Tensor, untouched: Tensor, first: int, kept: slice) -> None:
        """Take in what the untouched model has where this one has x; first: row of the sample that
        the first of the kept ones is."""
        if self.drift is None:
            self.compares()
        assert self.drift is not None
        assert self._reference is not None
        z = x.reshape(-1, x.shape[-1]).float()
        beside = untouched.reshape(z.shape).float()
        rows = beside[kept]
        self._reference[first : first + len(rows)] = rows
        self.drift.addmm_((beside - z).T, z)

    def observe(
        self,
        x: Tensor,
        act: Format | None,
        solver: Solver | None,
        untouched: Tensor | None = None,
        twice: int = 0,
        start: int | None = None,
    ) -> None:
        """Take in encoded activations [..., n] that `act` will quantize, for `solver`'s Hessian.

        untouched: what the same tokens have there in the untouched model, encoded. twice: the
        leading features whose residual is quantized, too. start: see `add`.
        """
        quantized = solver is not None and solver.hessian_input == "quantized"
        if self.hessian is None or act is None or not quantized:
            self.add(x, untouched=untouched, start=start)
            return
        global_scale = None
        if act.needs_static:
            # not known before the last micro-batch: each one's own range stands in for it
            global_scale = act.calibrated(*torch.aminmax(x))
        self.add(x, act.fake(x, global_scale=global_scale, twice=twice), untouched, start)

    @property
    def sample(self) -> Tensor:
        """The kept rows [s, n], float32; fewer where fewer tokens came than were announced."""
        return self._sample[: -(-self.tokens // self._stride)]

    @property
    def reference(self) -> Tensor:
        """What the untouched model has in the sample's rows [s, n]; the sample, if not told."""
        if self._reference is None:
            return self.sample
        return self._reference[: -(-self.tokens // self._stride)]

    def finish(self) -> None:
        """Add up what all ranks have, mirror the half that was computed and scale to the mean;
        once, after the last `add`."""
        self.tokens = sum(self.ranks.gather(self.tokens))
        self.range[0].neg_()
        self.ranks.maximum_(self.range)
        self.range[0].neg_()
        kept = (self._sample, self._reference, self.drift, self.hessian)
        self.ranks.sum_(*(tensor for tensor in kept if tensor is not None))
        if self.drift is not None:
            self.drift *= 2.0 / self.tokens
        if self.hessian is None:
            return
        if self.hessian.ndim == 2:
            for lo in range(PANEL, len(self.hessian), PANEL):
                self.hessian[:lo, lo : lo + PANEL] = self.hessian[lo : lo + PANEL, :lo].T
        self.hessian *= 2.0 / self.tokens  # of the mean squared output error
