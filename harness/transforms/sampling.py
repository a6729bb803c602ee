"""What transforms keep of activations that stream by: maxima, a covariance, a sample of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor, cat, float64, maximum, rand, zeros

from harness.transforms.base import generator
from harness.transforms.calibration_model import Collector

S = TypeVar("S")
T = TypeVar("T")


class Then(Generic[S, T]):
    """A collector whose result is handed on at once, so that one site's is held at a time."""

    def __init__(self, collector: Collector[S], then: Callable[[S], T]):
        self.collector = collector
        self.then = then

    def add(self, x: Tensor) -> None:
        self.collector.add(x)

    def finish(self) -> T:
        return self.then(self.collector.finish())


class Peak:
    """max|X_j| over all tokens, float32 [width]."""

    def __init__(self):
        self.peak: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in activations [..., width]."""
        peak = x.abs().flatten(0, -2).amax(0).float()
        if self.peak is not None:
            peak = maximum(self.peak, peak)
        self.peak = peak

    def finish(self) -> Tensor:
        """The maxima so far."""
        assert self.peak is not None  # a calibration text has a token
        return self.peak


class Covariance:
    """Running C = 1/N sum (x - m)^T (x - m) of blocks of `size` features; uncentered: m = 0."""

    def __init__(self, size: int, center: bool):
        self.size = size
        self.center = center
        self.tokens = 0
        # scalars of the CPU, which add to what lies on any device
        self.sum = zeros((), dtype=float64, device="cpu")
        self.product = zeros((), dtype=float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Take in activations [..., nb * size]."""
        rows = x.reshape(-1, x.shape[-1] // self.size, self.size).transpose(0, 1).float()
        self.tokens += rows.shape[1]
        # products in float32, which is what activations are good for, and sums of them in float64
        self.sum = self.sum + rows.double().sum(1)
        self.product = self.product + (rows.mT @ rows).double()

    def finish(self) -> Tensor:
        """C so far, [nb, size, size] float64."""
        mean = self.sum / self.tokens
        second = self.product / self.tokens
        if self.center:
            return second - mean[:, :, None] * mean[:, None, :]
        return second


class Reservoir:
    """An even sample of at most `size` rows; `key` seeds it, micro-batches do not change it."""

    def __init__(self, size: int, *key: object):
        self.size = size
        self.random = generator(*key)
        self._sample: tuple[Tensor, Tensor] | None = None  # rows, and the number drawn for each

    def add(self, x: Tensor) -> None:
        """Take in activations [..., n]."""
        rows = x.flatten(0, -2).float()
        order = rand(len(rows), generator=self.random, dtype=float64)
        if self._sample is not None:
            rows = cat([self._sample[0], rows])
            order = cat([self._sample[1], order])
        # the rows with the least numbers, which whatever comes later can only displace
        least = order.argsort()[: self.size]
        self._sample = (rows[least.to(rows.device)], order[least])

    def finish(self) -> Tensor:
        """The sample [size, n], float32."""
        assert self._sample is not None  # a calibration text has a token
        return self._sample[0]


class Starts:
    """A Reservoir, and beside it the first token of every window."""

    def __init__(self, size: int, *key: object):
        self.sample = Reservoir(size, *key)
        self.starts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in activations [windows, tokens, n]."""
        self.sample.add(x)
        self.starts.append(x[:, 0].float())

    def finish(self) -> tuple[Tensor, Tensor]:
        """(rows [size, n], starts [windows, n]), float32."""
        return self.sample.finish(), cat(self.starts)
