"""residual: the channels of largest range first, and what quantizing them leaves quantized again.

    x -> x P,   W <- W P                      P sorts channels by max|X_j| on calibration
    y = Q(x) Q(W)^T + Q(r) Q(W_k)^T           r = x_k - Q(x_k), x_k the first k channels
      = [Q(x), Q(r)] [Q(W), Q(W_k)]^T         one product of n + k features

k: the channels whose maximum exceeds `threshold` M, M the greatest of the site, up to a multiple of
the groups of activations and weights; or `channels`, the same at every site. Sorted, groups hold
channels of like range. Q(r) has block scales of its own and x's global scale. |r - Q(r)| <= |r| in
every element where 0 is a lattice point, for Q(r) is the nearest.

k columns of W are held and multiplied twice: bits per weight and flops are (1 + k / n) as many. P
stays online as a gather, for which engines need no arithmetic: they quantize in that order.

Source: ARCQuant (arXiv 2601.07475), 2^-3 of its threshold included. Differences: any format with
scales of groups or tokens (of tokens an engine takes two products, for a row has one scale), and
k a multiple of the formats' groups alone. In 16 bits Q(x) + Q(r) is rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from torch import Tensor

from harness.codecs.codec import Codec, Permutation
from harness.codecs.placement import Placement, Where
from harness.config.checks import integer, number
from harness.config.errors import ConfigError
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.sampling import Peak, Then


class Residual(Transform):
    """channels: auto (by threshold) or k. threshold: share of a site's greatest magnitude."""

    def __init__(self, channels: int | str = "auto", threshold: float = 0.125):
        self.channels: int | None = None
        if channels != "auto":
            self.channels = integer("transform.channels (or auto)", channels)
            self.unread = ("threshold",)
        self.threshold = number("transform.threshold", threshold, 0, 1)

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"residual channels at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(site for site in shape.widths if shape.quantizes(site))

    def check(self, shape: ModelShape) -> list[str]:
        if not self.encodes(shape):
            raise ConfigError(
                f"format.act.bits=16 with transform={self.name}: what is read is not quantized, "
                "so nothing is left of it; use transform=identity, or a format of activations."
            )
        for layer, site, width in self._places(shape):
            act = shape.reads(site, layer)
            if act is not None and act.granularity == "tensor":
                raise ConfigError(
                    f"format.act.granularity=tensor with transform={self.name}: the residual has "
                    "scales of its own; set format.act.granularity=token or group."
                )
            step = _step(shape, layer, site)
            k = self.channels
            if k is not None and (k % step or k > width):
                raise ConfigError(
                    f"transform.channels={k}: site {site} takes a multiple of its formats' groups, "
                    f"{step}, up to its {width} features; set transform.channels={step}, or auto."
                )
        return []

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        def collector(layer: int | None, site: str, width: int) -> Then[Tensor, Permutation]:
            assert layer is not None  # a site of a block, as all of them are
            step = _step(shape, layer, site)
            return Then(Peak(), lambda peak: self._codec(peak, step))

        sorted_sites = model.observe(collector, self.encodes(shape), "channel maxima")
        online: dict[Where, Codec] = {}
        counts: dict[str, list[int]] = {}
        for (layer, site), codec in sorted_sites.items():
            if shape.reads(site, layer) is None:  # a block whose override leaves it float
                continue
            online[layer, site] = codec
            counts.setdefault(site, []).append(codec.twice)
        means = {site: sum(ks) / len(ks) for site, ks in counts.items()}
        return Placement(online=online, notes={"residual_channels": means})

    def _codec(self, peak: Tensor, step: int) -> Permutation:
        """The order and k of a site whose channels have those maxima [n]."""
        width = len(peak)
        order = peak.argsort(descending=True, stable=True)
        twice = self.channels
        if twice is None:
            above = int((peak > self.threshold * peak.max()).sum())
            twice = min(-(-above // step) * step, width)  # a padded width is no multiple
        return Permutation(order.cpu(), twice)

    def _places(self, shape: ModelShape) -> Iterator[tuple[int, str, int]]:
        """(block, site, features) of what is encoded."""
        for site in self.encodes(shape):
            widths = shape.widths_of(site)
            for layer in range(shape.layers):
                width = widths.get(layer, widths.get(None))
                if width is not None:
                    yield layer, site, width


def _step(shape: ModelShape, layer: int, site: str) -> int:
    """What k is a multiple of: the groups in which a site is read, and its readers' weights."""
    sizes = [
        format.group_size or 1
        for name in shape.readers.get(site) or ("",)
        for part in ("act", "weight")
        if (format := shape.scheme.part(part, layer, name)) is not None
    ]
    return lcm(*sizes)
