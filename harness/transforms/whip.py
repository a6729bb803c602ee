"""Whip calibration: R1 and R2 that spread activations evenly, found from the activations alone.

    L(R) = mean over tokens t of  sum_j exp(-|y_tj|),    y = x R,    R = Q sign(diag T) of Z = Q T (QR-Orth)

The loss pulls values away from zero, so that at a fixed norm outliers shrink; it does not see column signs or permutations
of R. x is the norm-fused input, whose rms is 1. For n coordinates: random Hadamard .52 n, uniform .475 n, least n/e (all
|y| = 1). It is an integer-format tool: on NVFP4 it raises the error. Source: DartQuant (arXiv 2511.04063), with the sign fix
its code omits; JointQuant differs in the schedule alone:

    pooled   tokens of all layers in one pool, `share` of it an epoch        (DartQuant)
    greedy   layer by layer, going on from the last R
    joint    the sum over layers of their mean losses, every step            (JointQuant)

R1 can never be one a layer: the residual stream is shared.

sinks (ours): this share of R1's batches are first tokens of a window. They carry the massive activations on which attention
rests, one direction hundreds of times the median, and a Hadamard matrix spreads that direction perfectly flat. They are too
few to be seen in a mean over tokens: without them SmolLM2's error falls by 30 % on the other tokens, rises fourfold on these,
and the perplexity with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import get_type_hints

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.config.checks import integer, names, number, one_of, typed
from harness.linalg.hadamard import reachable
from harness.linalg.stiefel import project, qr_orth
from harness.transforms.base import CalibrationModel, ModelShape, generator
from harness.transforms.rotations import Rotations
from harness.transforms.sampling import Starts

SCHEDULES = ("pooled", "greedy", "joint")
TARGETS = {"q": "attn_in", "up": "mlp_in"}


def whip(y: Tensor) -> Tensor:
    """Mean over all tokens of sum_j exp(-|y_j|), y [.., n]."""
    return y.abs().neg().exp().sum(-1).mean()


@dataclass(frozen=True)
class Calibration:
    """SGD with momentum on Z: batch tokens a step, epochs passes; steps_per_epoch null: as many as the tokens fill."""

    lr: float
    epochs: int
    batch: int
    momentum: float = 0.9
    cosine: bool = False
    grad_clip: float | None = None
    steps_per_epoch: int | None = None

    @classmethod
    def of(cls, settings: Mapping, field: str) -> Calibration:
        """From a part of the configuration. Raises ConfigError for a key or a value that makes no sense."""
        typed(f"{field}.", settings, get_type_hints(cls), needed=("lr", "epochs", "batch"))
        own = cls(**settings)
        number(f"{field}.lr", own.lr, 0, 1e6)
        integer(f"{field}.epochs", own.epochs, low=0)
        integer(f"{field}.batch", own.batch)
        number(f"{field}.momentum", own.momentum, 0, 1)
        integer(f"{field}.steps_per_epoch", own.steps_per_epoch, optional=True)
        if own.grad_clip is not None:
            number(f"{field}.grad_clip", own.grad_clip, 1e-12, 1e12)
        return own

    def steps(self, tokens: int) -> int:
        """Steps in all, for so many tokens an epoch."""
        return self.epochs * (self.steps_per_epoch or max(1, tokens // self.batch))

    @torch.enable_grad()
    def descend(
        self,
        r: Tensor,
        x: Tensor,
        drawn: torch.Generator,
        steps: int,
        loss,
        tell: Callable[[float], None] = lambda loss: None,
        starts: Tensor | None = None,
        sinks: float = 0.0,
    ) -> Tensor:
        """R after `steps` steps of `loss(R, batch)` from r; a batch is `batch` random tokens, a share `sinks` of them from
        starts [.., W, n] and the rest from x [.., T, n], or all of x where an epoch is one step. tell: called with each step's
        loss."""
        whole = self.steps_per_epoch == 1
        few = round(sinks / (1 - sinks) * x.shape[-2]) if whole else round(sinks * self.batch)
        z = r.clone().requires_grad_()
        optimizer = torch.optim.SGD([z], lr=self.lr, momentum=self.momentum)
        schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
            if self.cosine
            else None
        )
        for step in range(steps):
            chosen = torch.randperm(x.shape[-2], generator=drawn)[: self.batch - few].to(x.device)
            batch = x if whole else x[..., chosen, :]
            if few:
                chosen = torch.randint(starts.shape[-2], (few,), generator=drawn).to(x.device)
                batch = torch.cat([batch, starts[..., chosen, :]], -2)
            value = loss(qr_orth(z), batch)
            optimizer.zero_grad()
            value.backward()
            now = float(value.detach())
            if not math.isfinite(now):
                raise FloatingPointError(
                    f"the whip loss is {now} in step {step + 1}: lower lr={self.lr}"
                )
            if self.grad_clip is not None:
                z.grad.mul_(
                    (self.grad_clip / z.grad.norm(dim=(-2, -1), keepdim=True)).clamp(max=1)
                )  # each matrix its own
            optimizer.step()
            if schedule:
                schedule.step()
            tell(now)
        return qr_orth(z.detach())


class Whip(Rotations):
    """schedule: pooled | greedy | joint. r1_targets: [q, up], whose inputs R1 is for. r1, r2: settings of a Calibration each.
    share: of the tokens an epoch visits. sinks: see above. max_tokens_per_site: activations kept, drawn evenly; besides the
    first token of each window no more are ever held."""

    learned = True
    sees = ()  # R1 and R2 come from float activations

    def __init__(
        self,
        schedule: str,
        r1_targets: list[str],
        max_tokens_per_site: int,
        r1: Mapping,
        r2: Mapping | None,
        share: float = 1.0,
        sinks: float = 0.0,
        r3: str | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        super().__init__(r2 is not None, r3, r4, random_signs)
        self.schedule = one_of("transform.schedule", schedule, SCHEDULES)
        self.sites = [
            TARGETS[target] for target in names("transform.r1_targets", r1_targets, TARGETS)
        ]
        self.kept = integer("transform.max_tokens_per_site", max_tokens_per_site)
        self.share, self.sinks = (
            number("transform.share", share, 1e-6, 1),
            number("transform.sinks", sinks, 0, 0.9),
        )
        self.for_r1 = Calibration.of(r1, "transform.r1")
        self.for_r2 = None if r2 is None else Calibration.of(r2, "transform.r2")

    def check(self, context: ModelShape) -> list[str]:
        self.needs_activations(context)
        reachable(
            "transform.r1 starts from a Hadamard matrix",
            context.hidden,
            "transform=spinquant transform.r1=random",
        )
        return super().check(context)

    def matrices(
        self, context: ModelShape, subject: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        sites = [*self.sites, *(["o_in"] if self.for_r2 else [])]
        found = subject.observe(
            lambda layer, site, n: Starts(self.kept, context.seed, layer, site),
            sites,
            "activations",
        )
        own = [found[layer, site] for layer in range(context.layers) for site in self.sites]
        r1, notes = self._learn_r1(context, subject, *(torch.stack(kept) for kept in zip(*own)))
        r2 = {}
        if self.for_r2:
            values = torch.stack([found[layer, "o_in"][0] for layer in range(context.layers)])
            learned, more = self._learn_r2(context, subject, values)
            r2, notes = {i: Blocks(matrix) for i, matrix in enumerate(learned)}, notes | more
        return Blocks(r1), r2, notes

    def _learn_r1(
        self, context: ModelShape, subject: CalibrationModel, x: Tensor, starts: Tensor
    ) -> tuple[Tensor, dict]:
        """R1 from x [sites, T, n] and starts [sites, W, n]: a schedule cuts them in pieces to descend on in turn."""
        cut = {
            "pooled": lambda t: [t.flatten(0, 1)[None]],
            "greedy": lambda t: t[:, None],
            "joint": lambda t: [t],
        }
        pieces = list(zip(*map(cut[self.schedule], (x, starts))))
        start = r = (
            self.draw(context, context.hidden, "R1").matrix.dense(torch.float32).to(x.device)
        )
        drawn, steps = (
            generator(context.seed, "whip R1"),
            self.for_r1.steps(int(self.share * pieces[0][0].shape[1])),
        )
        with _told(
            subject, f"whip R1, {self.schedule}", steps * len(pieces), "r1/whip", len(pieces[0][0])
        ) as tell:
            for piece, first in pieces:

                def loss(r, y):
                    return sum(whip(own @ r) for own in y)

                r = self.for_r1.descend(r, piece, drawn, steps, loss, tell, first, self.sinks)
        before, after = (
            float(torch.stack([whip(own @ m) for own in x]).mean()) for m in (start, r)
        )
        moved = float((r - start).norm())
        notes = {
            "schedule": self.schedule,
            "r1_whip": [before, after],
            "r1_moved": moved,
            "r1_steps": steps,
        }
        return project(r.double()).cpu(), notes

    def _learn_r2(
        self, context: ModelShape, subject: CalibrationModel, x: Tensor
    ) -> tuple[Tensor, dict]:
        """R2 [layers, kv_heads, head_dim, head_dim] from o's inputs [layers, T, heads * head_dim]."""
        heads = x.unflatten(
            -1, (context.kv_heads, -1, context.head_dim)
        )  # [layers, T, kv_heads, repeat, head_dim]
        heads = heads.permute(0, 2, 3, 1, 4).flatten(2, 3)
        one = torch.stack(
            [
                self.draw(context, context.head_dim, i, "R2").matrix.dense(torch.float32)
                for i in range(len(x))
            ]
        )
        start = one[:, None].expand(-1, context.kv_heads, -1, -1).to(x.device).contiguous()
        drawn, steps = generator(context.seed, "whip R2"), self.for_r2.steps(heads.shape[2])
        matrices = start.shape[0] * start.shape[1]
        with _told(subject, "whip R2", steps, "r2/whip", matrices) as tell:
            # the matrices are independent: the gradient of the sum is each one's own
            r = self.for_r2.descend(
                start, heads, drawn, steps, lambda r, y: whip(y @ r) * matrices, tell
            )
        return project(r.double()).cpu(), {
            "r2_whip": [float(whip(heads @ start)), float(whip(heads @ r))]
        }


@contextmanager
def _told(
    subject: CalibrationModel, title: str, total: int, curve: str, terms: int
) -> Iterator[Callable[[float], None]]:
    """A stage that yields `tell(loss)`, to be called after each step: it moves the bar and adds to a curve the mean of the
    loss's terms, which is what the notes say too."""
    steps = count(1)
    with subject.stage(title, total) as advance:

        def tell(loss: float) -> None:
            advance(f"whip {loss / terms:.2f}")
            subject.log({curve: loss / terms}, next(steps))

        yield tell
