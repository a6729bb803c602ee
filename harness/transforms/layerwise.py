"""Codecs fitted site by site from activations alone, without a pass through the whole model.

    layer   min over E, D_k in O(n)   sum over linears k of  |X W_k^T - Q(X E) D_k W_k^T|^2 / |X W_k^T|^2     (Cayley SGD)
    ridge   D = argmin |X - Q(X E) D|^2 + lambda |D|^2 = (Q^T Q + lambda I)^-1 Q^T X,   lambda = 1e-4 mean diag(Q^T Q)

Cheap, and an upper bound on what a decoder can undo; with a straight-through gradient the layer loss hardly leaves its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.formats import Format
from harness.linalg.blocks import times
from harness.transforms.base import CalibrationModel, ModelShape
from harness.transforms.learn import Best, Descent, Orthogonal
from harness.transforms.sampling import Reservoir

ROWS = 4096  # activations kept of a site; a tenth of them chooses the best iterate
ROWS_A_WINDOW = 512
RIDGE = 1e-4


class Ridge:
    """Running normal equations of one site; `finish` gives (D [1, n, n] float64, relative error of X it leaves)."""

    def __init__(self, encoder: Codec, act: Format | None):
        self.encoder, self.fake = encoder, fake(act, ste=False)
        self.gram, self.cross, self.power = 0.0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Take in activations [..., n]."""
        x = x.flatten(0, -2).float()
        q = self.fake(self.encoder.encode(x))
        self.gram, self.cross = self.gram + (q.T @ q).double(), self.cross + (q.T @ x).double()
        self.power += float(x.double().square().sum())

    def finish(self) -> tuple[Tensor, float]:
        damped = self.gram.clone()
        damped.diagonal().add_(RIDGE * damped.diagonal().mean())
        decoder = torch.linalg.solve(damped, self.cross)
        error = (
            self.power - 2 * (self.cross * decoder).sum() + (decoder * (self.gram @ decoder)).sum()
        )
        return decoder[None].cpu(), float(error) / self.power


def reconstruct(
    subject: CalibrationModel, context: ModelShape, start: Mapping[str, Tensor], descent: Descent
) -> tuple[dict, dict]:
    """Learned {site: [L, nb, g, g], site^: [L, linears, nb, g, g]} from such a start, by the layer objective, and notes."""
    sites = [name for name in start if not name.endswith("^")]

    def collector(layer: int, site: str, width: int) -> Reservoir:
        weights = [
            subject.weight(layer, r.name)
            for r in subject.roles.values()
            if (r.layer, r.reads) == (layer, site)
        ]
        own, act = (
            {name: start[name][layer] for name in (site, f"{site}^") if name in start},
            context.reads(site, layer),
        )
        before = (layer * len(sites) + sites.index(site)) * descent.steps

        def log(values, step):
            return subject.log(values, before + step)

        return Reservoir(
            ROWS,
            context.seed,
            layer,
            site,
            then=lambda x: _fit(x, weights, own, site, act, descent, log),
        )

    def losses(found: Mapping) -> list[float]:
        return [sum(f[1][k] for f in found.values()) / len(found) for k in (0, 1)]

    found = subject.observe(
        collector,
        sites,
        "layer objective",
        lambda found: "held out {:.5f}, was {:.5f}".format(*reversed(losses(found))),
    )
    learned = {
        n: torch.stack([found[i, n.rstrip("^")][0][n] for i in range(context.layers)])
        for n in start
    }
    return learned, {"objective": "layer", "steps": descent.steps, "held_out_loss": losses(found)}


def fake(act: Format | None, ste: bool) -> Callable[[Tensor], Tensor]:
    """x -> Q(x) with scales from each tensor; x itself where nothing is quantized."""
    return (lambda x: x) if act is None else partial(act.dynamic().fake, ste=ste)


@torch.enable_grad()
def _fit(
    x: Tensor,
    weights: list[Tensor],
    start: Mapping,
    site: str,
    act: Format | None,
    descent: Descent,
    log: Callable[[dict, int], None],
) -> tuple[dict, list]:
    held, x = x[: max(1, len(x) // 10)], x[max(1, len(x) // 10) :]
    moving = Orthogonal({name: matrix.to(x.device) for name, matrix in start.items()}, descent)
    rows, quantize = ROWS_A_WINDOW * descent.batch, fake(act, ste=True)

    def loss(matrices: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y = quantize(Blocks(matrices[site]).encode(x))
        decoders = (
            matrices[f"{site}^"].unbind(0)
            if f"{site}^" in matrices
            else [matrices[site]] * len(weights)
        )
        total = 0.0
        for weight, decoder in zip(weights, decoders):
            wanted = x @ weight.float().T
            total = (
                total
                + (times(y, decoder.mT) @ weight.float().T - wanted).square().sum()
                / wanted.square().sum()
            )
        return total / len(weights)

    with torch.no_grad():
        best = Best(moving, float(loss(moving.snapshot(), held)), descent.steps)
    for step in range(1, descent.steps + 1):
        value = loss(moving.matrices(), x[torch.arange((step - 1) * rows, step * rows) % len(x)])
        value.backward()
        point = {"learn/loss": float(value.detach())}
        if not math.isfinite(point["learn/loss"]):
            raise FloatingPointError(
                f"the layer loss at {site} is not finite in step {step}: lower lr={descent.lr}"
            )
        moving.step()
        if best.due(step):
            with torch.no_grad():
                now = moving.snapshot()
                point["learn/held_out"] = float(loss(now, held))
                best.offer(step, now, point["learn/held_out"])
        log(point, step)
    return best.projected(), [best.first, best.loss]
