"""QR-Orth: an orthogonal R found by plain SGD on a matrix that is free.

    R = Q sign(diag T)  of  Z = Q T,      Z <- Z - lr dL/dZ,   Z = R at the start

Batches are drawn from activations that lie in memory. Source: DartQuant (arXiv 2511.04063).
Difference: the sign fix, which its code omits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor

from harness.config.checks import integer, number, typed
from harness.linalg.stiefel import qr_orth


def unreported(loss: float) -> None:
    """A step's loss that nobody keeps."""


@dataclass(frozen=True)
class Calibration:
    """SGD with momentum on Z.

    batch: tokens a step. epochs: passes. steps_per_epoch: null for as many as the tokens fill.
    cosine: lr falls to 0. grad_clip: most norm of a matrix's gradient, null for any.
    """

    lr: float
    epochs: int
    batch: int
    momentum: float = 0.9
    cosine: bool = False
    grad_clip: float | None = None
    steps_per_epoch: int | None = None

    @classmethod
    def of(cls, settings: Mapping, field: str) -> Calibration:
        """From a part of the configuration.

        Raises ConfigError for a key or a value that makes no sense.
        """
        typed(f"{field}.", settings, get_type_hints(cls), needed=("lr", "epochs", "batch"))
        calibration = cls(**settings)
        number(f"{field}.lr", calibration.lr, 0, 1e6)
        integer(f"{field}.epochs", calibration.epochs, low=0)
        integer(f"{field}.batch", calibration.batch)
        number(f"{field}.momentum", calibration.momentum, 0, 1)
        integer(f"{field}.steps_per_epoch", calibration.steps_per_epoch, optional=True)
        if calibration.grad_clip is not None:
            number(f"{field}.grad_clip", calibration.grad_clip, 1e-12, 1e12)
        return calibration

    def steps(self, tokens: int) -> int:
        """Steps in all, for so many tokens an epoch."""
        return self.epochs * (self.steps_per_epoch or max(1, tokens // self.batch))

    @torch.enable_grad()
    def descend(
        self,
        r: Tensor,
        x: Tensor,
        random: torch.Generator,
        steps: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        report: Callable[[float], None] = unreported,
        starts: Tensor | None = None,
        sinks: float = 0.0,
    ) -> Tensor:
        """R after `steps` steps of `loss(R, batch)` from r.

        x [.., T, n], starts [.., W, n]: what batches are drawn from. sinks: the share of starts in
        each. report: called with each step's loss. Raises FloatingPointError when that is not
        finite.
        """
        z = r.clone().requires_grad_()
        optimizer = torch.optim.SGD([z], lr=self.lr, momentum=self.momentum)
        schedule = None
        if self.cosine:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for step in range(steps):
            value = loss(qr_orth(z), self._batch(x, random, starts, sinks))
            optimizer.zero_grad()
            value.backward()
            now = float(value.detach())
            if not math.isfinite(now):
                raise FloatingPointError(
                    f"the whip loss is {now} in step {step + 1}: lower lr={self.lr}"
                )
            if self.grad_clip is not None and z.grad is not None:
                # each matrix its own norm: they are learned side by side, not together
                norm = z.grad.norm(dim=(-2, -1), keepdim=True)
                z.grad.mul_((self.grad_clip / norm).clamp(max=1))
            optimizer.step()
            if schedule is not None:
                schedule.step()
            report(now)
        return qr_orth(z.detach())

    def _batch(
        self, x: Tensor, random: torch.Generator, starts: Tensor | None, sinks: float
    ) -> Tensor:
        """`batch` random tokens, a share `sinks` of them starts and the rest of x.

        All of x, and starts in proportion, where an epoch is one step.
        """
        whole = self.steps_per_epoch == 1
        few = 0
        if starts is not None:
            few = round(sinks / (1 - sinks) * x.shape[-2]) if whole else round(sinks * self.batch)
        # drawn even where x is taken whole, so that the starts after it are the same either way
        rows = torch.randperm(x.shape[-2], generator=random)[: self.batch - few].to(x.device)
        batch = x if whole else x[..., rows, :]
        if starts is None or not few:
            return batch
        rows = torch.randint(starts.shape[-2], (few,), generator=random).to(x.device)
        return torch.cat([batch, starts[..., rows, :]], -2)
