"""Codecs fitted site by site from activations alone, without a pass through the whole model.

    layer   min over E, D_k in O(n)  of  sum over linears k of
            |X W_k^T - Q(X E) D_k W_k^T|^2 / |X W_k^T|^2            by Cayley SGD

    ridge   D = argmin |X - Q(X E) D|^2 + lambda |D|^2
              = (Q^T Q + lambda I)^-1 Q^T X,    lambda = 1e-4 mean diag(Q^T Q)

Cheap, and an upper bound on what a decoder can undo; with a straight-through gradient the layer
loss hardly leaves its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.placement import Where
from harness.formats import Format
from harness.linalg.blocks import times
from harness.transforms.base import ModelShape
from harness.transforms.calibration_model import CalibrationModel, weights_at
from harness.transforms.learn import Best, Descent, Orthogonal
from harness.transforms.sampling import Reservoir, Then

ROWS = 4096  # activations kept of a site; a tenth of them chooses the best iterate
ROWS_A_WINDOW = 512
RIDGE = 1e-4


class Ridge:
    """Running normal equations of one site."""

    def __init__(self, encoder: Codec, act: Format | None):
        self.encoder = encoder
        self.fake = fake(act, ste=False)
        # scalars of the CPU, which add to what lies on any device
        self.gram = torch.zeros((), dtype=torch.float64, device="cpu")
        self.cross = torch.zeros((), dtype=torch.float64, device="cpu")
        self.power = 0.0

    def add(self, x: Tensor) -> None:
        """Take in activations [..., n]."""
        x = x.flatten(0, -2).float()
        q = self.fake(self.encoder.encode(x))
        self.gram = self.gram + (q.T @ q).double()
        self.cross = self.cross + (q.T @ x).double()
        self.power += float(x.double().square().sum())

    def finish(self) -> tuple[Tensor, float]:
        """(D [1, n, n] float64, relative error of X it leaves)."""
        damped = self.gram.clone()
        damped.diagonal().add_(RIDGE * damped.diagonal().mean())
        decoder = torch.linalg.solve(damped, self.cross)
        # |X - Q D|^2, multiplied out: no activation is kept
        mixed = 2 * (self.cross * decoder).sum()
        error = self.power - mixed + (decoder * (self.gram @ decoder)).sum()
        return decoder[None].cpu(), float(error) / self.power


@dataclass(frozen=True)
class Fit:
    """What a site learned: matrices {name: [.., g, g]}, the held-out loss at first and at best."""

    matrices: Mapping[str, Tensor]
    first: float
    best: float


def ridge(
    model: CalibrationModel, shape: ModelShape, start: Mapping[str, Tensor]
) -> tuple[dict[Where, Codec], dict[str, object]]:
    """{(layer, site): an encoder and its ridge decoder}, and notes: their mean relative error.

    start: {site: encoders [L, nb, g, g]}.
    """

    def collector(layer: int | None, site: str, width: int) -> Ridge:
        return Ridge(Blocks(start[site][layer]), shape.reads(site, layer))

    solved = model.observe(collector, start, "ridge decoders")
    online: dict[Where, Codec] = {
        (layer, site): Blocks(start[site][layer], decoder)
        for (layer, site), (decoder, _) in solved.items()
    }
    error = sum(error for _, error in solved.values()) / len(solved)
    return online, {"ridge_error": error}


def reconstruct(
    model: CalibrationModel, shape: ModelShape, start: Mapping[str, Tensor], descent: Descent
) -> tuple[dict[str, Tensor], dict]:
    """Matrices learned by the layer objective, and notes.

    start: {site: [L, nb, g, g], site^: [L, linears, nb, g, g]}, encoders and decoders, as are those
    learned.
    """
    sites = [name for name in start if not name.endswith("^")]

    def collector(layer: int | None, site: str, width: int) -> Then[Tensor, Fit]:
        assert layer is not None  # a site of a block, as all of them are
        names = [name for name in (site, f"{site}^") if name in start]
        before = (layer * len(sites) + sites.index(site)) * descent.steps
        layerwise = _Site(
            site,
            list(weights_at(model, layer, site)),
            fake(shape.reads(site, layer), ste=True),
            lambda values, step: model.log(values, before + step),
        )
        matrices = {name: start[name][layer] for name in names}
        return Then(
            Reservoir(ROWS, shape.seed, layer, site), lambda x: layerwise.fit(x, matrices, descent)
        )

    fits = model.observe(
        collector,
        sites,
        "layer objective",
        lambda fits: "held out {1:.5f}, was {0:.5f}".format(*_mean_losses(fits)),
    )
    learned = {
        name: torch.stack(
            [fits[layer, name.rstrip("^")].matrices[name] for layer in range(shape.layers)]
        )
        for name in start
    }
    notes = {"objective": "layer", "steps": descent.steps, "held_out_loss": _mean_losses(fits)}
    return learned, notes


def fake(act: Format | None, ste: bool) -> Callable[[Tensor], Tensor]:
    """x -> Q(x) with scales from each tensor; x itself where nothing is quantized."""
    if act is None:
        return lambda x: x
    return partial(act.dynamic().fake, ste=ste)


def _mean_losses(fits: Mapping[Where, Fit]) -> list[float]:
    """Over all sites, at first and at best."""
    first = sum(fit.first for fit in fits.values())
    best = sum(fit.best for fit in fits.values())
    return [first / len(fits), best / len(fits)]


@dataclass(frozen=True)
class _Site:
    """A site whose codec is learned from what `weights` make of its rows."""

    name: str
    weights: list[Tensor]
    quantize: Callable[[Tensor], Tensor]
    log: Callable[[dict, int], None]

    @torch.enable_grad()
    def fit(self, x: Tensor, start: Mapping[str, Tensor], descent: Descent) -> Fit:
        """From rows x [T, n]. Raises FloatingPointError when the loss is not finite."""
        # the sample is in no order, so that its first rows are as good as any
        count = max(1, len(x) // 10)
        held = x[:count]
        x = x[count:]
        rows = ROWS_A_WINDOW * descent.batch
        moving = Orthogonal({name: m.to(x.device) for name, m in start.items()}, descent)
        best = Best(moving, self._held_out(moving.snapshot(), held), descent.steps)
        for step in range(1, descent.steps + 1):
            # in turn, and from the start again when all were seen
            batch = x[torch.arange((step - 1) * rows, step * rows) % len(x)]
            value = self.loss(moving.matrices(), batch)
            value.backward()
            point = {"learn/loss": float(value.detach())}
            if not math.isfinite(point["learn/loss"]):
                raise FloatingPointError(
                    f"the layer loss at {self.name} is not finite in step {step}: "
                    f"lower lr={descent.lr}"
                )
            moving.step()
            if best.due(step):
                now = moving.snapshot()
                point["learn/held_out"] = self._held_out(now, held)
                best.offer(step, now, point["learn/held_out"])
            self.log(point, step)
        return Fit(best.projected(), best.first, best.loss)

    def loss(self, matrices: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The mean over the linears of their relative errors."""
        y = self.quantize(Blocks(matrices[self.name]).encode(x))
        decoders = [matrices[self.name]] * len(self.weights)
        if f"{self.name}^" in matrices:
            decoders = matrices[f"{self.name}^"].unbind(0)
        total = x.new_zeros(())
        for weight, decoder in zip(self.weights, decoders):
            target = x @ weight.float().T
            error = times(y, decoder.mT) @ weight.float().T - target
            total = total + error.square().sum() / target.square().sum()
        return total / len(self.weights)

    @torch.no_grad()
    def _held_out(self, matrices: Mapping[str, Tensor], held: Tensor) -> float:
        return float(self.loss(matrices, held))
