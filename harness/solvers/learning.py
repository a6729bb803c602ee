"""Learning a block's quantized weights from its outputs, with the best iterate kept.

    min  mean_{batch, channels} sum_{sequence} (block(x) - block^(x'))^2

x is the untouched stream, x' what a step reads. The last tenth of the batches is held out: what is
kept are the parameters of least loss there, with the weights as they will be stored and the stream
as it will arrive, the start included. Ranks have their parts of each batch: losses and gradients
are added up, and all take the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.parallel.gradients import add_gradients
from harness.solvers.block import Block
from harness.solvers.problem import Problem

HELD = 10  # every tenth batch, at the end, chooses the best iterate
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
    loss: Callable[[int, int], Tensor],
    move: Callable[[int], None],
    remedy: str,
) -> dict:
    """Learn for so many steps, then leave the best iterate in `parameters`, all zero at first.

    title: the family of the curves. weights: {name: [out, in]} as they are to be stored.
    loss(step, batch): step 1, 2, .. on a batch, this rank's part of its `error`. move(step): along
    the parameters' gradients. Returns the report {loss_before, loss_after, best_step}. Raises
    RuntimeError, with the remedy, where the loss is no longer finite.
    """
    train, held = _split(len(block.batches))
    every = max(1, steps // CHECKS)
    first = _held_out(block, weights, held)
    lowest = first
    best_step = 0
    best: list[Tensor] | None = None  # the start needs no copy: it is zero
    with block.stage(title, max(1, steps)) as advance:
        for step in range(1, steps + 1):
            part = loss(step, (step - 1) % train)
            if part.requires_grad:  # this rank has windows of the batch
                part.backward()
            total = sum(block.ranks.gather(part.item()))
            if not math.isfinite(total):
                raise RuntimeError(f"{title}: the loss is {total} after {step - 1} steps; {remedy}")
            add_gradients(parameters, block.ranks)
            move(step)
            for parameter in parameters:
                parameter.grad = None
            point = {f"{title}/loss": total}
            if step % every == 0 or step == steps:
                now = _held_out(block, weights, held)
                point[f"{title}/held_out"] = now
                if now < lowest:
                    lowest = now
                    best_step = step
                    best = [p.detach().clone() for p in parameters]
            block.log(point, block.index * steps + step)
            advance(f"loss {total:.4g}")
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            if best is None:
                parameter.zero_()
            else:
                parameter.copy_(best[index])
    return {"loss_before": first, "loss_after": lowest, "best_step": best_step}


def error(
    block: Block, batch: int, read: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> Tensor:
    """What this rank's parts of a batch, which read such hidden states, add to its `distance`."""
    total = torch.zeros(())
    for part, hidden in zip(block.batches[batch], read):
        output = block.forward(part.index, hidden, weights)
        total = total + part.share * distance(output, block.targets[part.index])
    return total


def arriving(block: Block, batch: int) -> list[Tensor]:
    """The hidden states of this rank's parts of a batch as the solved blocks give them."""
    return [block.quantized[part.index] for part in block.batches[batch]]


def distance(output: Tensor, target: Tensor) -> Tensor:
    """(output - target)^2 summed over the sequence, averaged over batch and channels.

    [B, L, n] each.
    """
    return (output.float() - target.float()).square().sum(1).mean()


@torch.no_grad()
def _held_out(block: Block, weights: Callable[[], Mapping[str, Tensor]], held: range) -> float:
    """Mean loss on the held-out batches as the block will really read them."""
    stored = weights()
    own = [error(block, batch, arriving(block, batch), stored).item() for batch in held]
    losses = [sum(parts) for parts in zip(*block.ranks.gather(own))]
    mean = float(torch.tensor(losses).mean())
    # NaN is neither more nor less than anything; infinity is never the least
    return mean if math.isfinite(mean) else math.inf


def _split(count: int) -> tuple[int, range]:
    """(how many of the first batches are learned from, the others)."""
    if count == 1:  # which has to serve as both
        return 1, range(1)
    train = count - max(1, count // HELD)
    return train, range(train, count)
