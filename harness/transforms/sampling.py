"""What transforms keep of activations that stream by: a covariance, or an even sample of rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, cat, float64, rand

from harness.transforms.base import generator


class Covariance:
    """Running C = 1/N sum (x - m)^T (x - m) of blocks of `size` features, [nb, size, size] float64; uncentered: m = 0.

    `finish` hands it to `then`, so that the covariances of one layer are held at a time.
    """

    def __init__(self, size: int, center: bool, then: Callable[[Tensor], Tensor] | None = None):
        self.size, self.center, self.then = size, center, then
        self.tokens, self.sum, self.product = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Take in activations [..., nb * size]."""
        rows = x.reshape(-1, x.shape[-1] // self.size, self.size).transpose(0, 1).float()
        self.tokens += rows.shape[1]
        self.sum = self.sum + rows.double().sum(1)
        self.product = self.product + (rows.mT @ rows).double()

    def value(self) -> Tensor:
        """C so far."""
        mean = self.sum / self.tokens
        second = self.product / self.tokens
        return second - mean[:, :, None] * mean[:, None, :] if self.center else second

    def finish(self) -> Tensor | None:
        return self.then(self.value()) if self.then else None


class Reservoir:
    """An even sample of at most `size` rows [size, n], float32; `key` seeds it, and micro-batches do not change it."""

    def __init__(self, size: int, *key: object, then: Callable[[Tensor], object] | None = None):
        self.size, self.random, self.then = size, generator(*key), then
        self.rows, self.order = None, None

    def add(self, x: Tensor) -> None:
        """Take in activations [..., n]."""
        rows = x.flatten(0, -2).float()
        order = rand(len(rows), generator=self.random, dtype=float64)
        if self.rows is not None:
            rows, order = cat([self.rows, rows]), cat([self.order, order])
        kept = order.argsort()[: self.size]
        self.rows, self.order = rows[kept.to(rows.device)], order[kept]

    def finish(self):
        return self.then(self.rows) if self.then else self.rows


class Starts(Reservoir):
    """A Reservoir that also keeps the first token of every window: `finish` gives (rows [size, n], starts [windows, n])."""

    def __init__(self, size: int, *key: object):
        super().__init__(size, *key)
        self.starts = []

    def add(self, x: Tensor) -> None:
        """Take in activations [windows, tokens, n]."""
        super().add(x)
        self.starts.append(x[:, 0].float())

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.rows, cat(self.starts)
