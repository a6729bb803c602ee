"""Learning a block's quantized weights from its outputs, with the best iterate kept.

    min  mean_{batch, channels} sum_{sequence} (block(x) - block^(x'))^2

x is the untouched stream, x' what a step reads. The last tenth of the micro-batches is held out:
what is kept are the parameters of least loss there, with the weights as they will be stored and the
stream as it will arrive, the start included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.solvers.base import Block, Problem

HELD = 10  # every tenth micro-batch, at the end, chooses the best iterate
CHECKS = 8  # times the held-out loss is taken


def problems(block: Block) -> Iterator[Problem]:
    """What is to be quantized, site by site, whose linears may share a global scale."""
    for linears in block.sites.values():
        formats = {name: block.formats[name] for name in linears if name in block.formats}
        if formats:
            weights = block.weights
            yield Problem({name: weights[name] for name in formats}, formats)


def learn(
    block: Block,
    title: str,
    steps: int,
    parameters: Sequence[Tensor],
    weights: Callable[[], Mapping[str, Tensor]],
    descend: Callable[[int, int], float],
    remedy: str,
) -> dict:
    """Learn for so many steps, then leave the best iterate in `parameters`, all zero at first.

    title: the family of the curves. weights: {name: [out, in]} as they are to be stored.
    descend(step, index): step 1, 2, .. on micro-batch `index`; returns its loss. Returns the report
    {loss_before, loss_after, best_step}. Raises RuntimeError, with the remedy, where the loss is no
    longer finite.
    """
    train, held = _split(len(block.quantized))
    every = max(1, steps // CHECKS)
    first = _held_out(block, weights, held)
    lowest = first
    best_step = 0
    best: list[Tensor] | None = None  # the start needs no copy: it is zero
    with block.stage(title, max(1, steps)) as advance:
        for step in range(1, steps + 1):
            loss = descend(step, (step - 1) % train)
            if not math.isfinite(loss):
                raise RuntimeError(f"{title}: the loss is {loss} after {step - 1} steps; {remedy}")
            point = {f"{title}/loss": loss}
            if step % every == 0 or step == steps:
                now = _held_out(block, weights, held)
                point[f"{title}/held_out"] = now
                if now < lowest:
                    lowest = now
                    best_step = step
                    best = [p.detach().clone() for p in parameters]
            block.log(point, block.index * steps + step)
            advance(f"loss {loss:.4g}")
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            if best is None:
                parameter.zero_()
            else:
                parameter.copy_(best[index])
    return {"loss_before": first, "loss_after": lowest, "best_step": best_step}


def distance(output: Tensor, target: Tensor) -> Tensor:
    """(output - target)^2 summed over the sequence, averaged over batch and channels.

    [B, L, n] each.
    """
    return (output.float() - target.float()).square().sum(1).mean()


@torch.no_grad()
def _held_out(block: Block, weights: Callable[[], Mapping[str, Tensor]], held: range) -> float:
    """Mean loss on the held-out micro-batches as the block will really read them."""
    stored = weights()
    losses = [
        distance(block.forward(i, block.quantized[i], stored), block.targets[i]) for i in held
    ]
    mean = float(torch.stack(losses).mean())
    # NaN is neither more nor less than anything; infinity is never the least
    return mean if math.isfinite(mean) else math.inf


def _split(count: int) -> tuple[int, range]:
    """(how many of the first micro-batches are learned from, the others)."""
    if count == 1:  # which has to serve as both
        return 1, range(1)
    train = count - max(1, count // HELD)
    return train, range(train, count)
