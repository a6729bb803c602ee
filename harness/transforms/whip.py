"""Whip calibration: R1 and R2 that spread activations evenly, found from the activations alone.

    L(R) = mean over tokens t of  sum_j exp(-|y_tj|),    y = x R,    R by QR-Orth (qr_orth.py)

The loss pulls values away from zero, so that at a fixed norm outliers shrink; it does not see
column signs or permutations of R. x is the norm-fused input, whose rms is 1. For n coordinates:
random Hadamard .52 n, uniform .475 n, least n/e (all |y| = 1). It is an integer-format tool: on
NVFP4 it raises the error. Source: DartQuant (arXiv 2511.04063). Differences: those of qr_orth.py,
and sinks. JointQuant differs in the schedule alone:

    pooled   tokens of all layers in one pool, `share` of it an epoch        (DartQuant)
    greedy   layer by layer, going on from the last R
    joint    the sum over layers of their mean losses, every step            (JointQuant)

R1 can never be one a layer: the residual stream is shared.

sinks (ours): this share of R1's batches are first tokens of a window. They carry the massive
activations on which attention rests, one direction hundreds of times the median, and a Hadamard
matrix spreads that direction perfectly flat. They are too few to be seen in a mean over tokens:
without them SmolLM2's error falls by 30 % on the other tokens, rises fourfold on these, and the
perplexity with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.config.checks import integer, names, number, one_of
from harness.linalg.hadamard import reachable
from harness.linalg.stiefel import project
from harness.transforms.base import ModelShape, generator
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.qr_orth import Calibration
from harness.transforms.rotations import Rotations
from harness.transforms.sampling import Starts

SCHEDULES = ("pooled", "greedy", "joint")
TARGETS = {"q": "attn_in", "up": "mlp_in"}


def whip(y: Tensor) -> Tensor:
    """Mean over all tokens of sum_j exp(-|y_j|), y [.., n]."""
    return y.abs().neg().exp().sum(-1).mean()


class Whip(Rotations):
    """The parts that dartquant and jointquant share.

    schedule: pooled | greedy | joint. r1_targets: [q, up], whose inputs R1 is for. r1, r2: settings
    of a Calibration each; r2 null leaves values alone. share: of the tokens an epoch visits. sinks:
    see above. max_tokens_per_site: activations kept, drawn evenly; besides the first token of each
    window no more are ever held.
    """

    learned = True
    sees = ()  # R1 and R2 come from float activations

    def __init__(
        self,
        schedule: str,
        r1_targets: Sequence[str],
        max_tokens_per_site: int,
        r1: Mapping,
        r2: Mapping | None,
        share: float = 1.0,
        sinks: float = 0.0,
        r3: str | int | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        super().__init__(r2 is not None, r3, r4, random_signs)
        self.schedule = one_of("transform.schedule", schedule, SCHEDULES)
        targets = names("transform.r1_targets", r1_targets, TARGETS)
        self.sites = [TARGETS[target] for target in targets]
        integer("transform.max_tokens_per_site", max_tokens_per_site)
        self.tokens = max_tokens_per_site
        self.share = number("transform.share", share, 1e-6, 1)
        self.sinks = number("transform.sinks", sinks, 0, 0.9)
        self.for_r1 = Calibration.of(r1, "transform.r1")
        self.for_r2 = None
        if r2 is not None:
            self.for_r2 = Calibration.of(r2, "transform.r2")

    def check(self, shape: ModelShape) -> list[str]:
        self.needs_activations(shape)
        reachable(
            "transform.r1 starts from a Hadamard matrix",
            shape.hidden,
            "transform=spinquant transform.r1=random",
        )
        return super().check(shape)

    def matrices(
        self, shape: ModelShape, model: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        sites = [*self.sites, "o_in"] if self.for_r2 else self.sites
        samples = model.observe(
            lambda layer, site, width: Starts(self.tokens, shape.seed, layer, site),
            sites,
            "activations",
        )
        places = [(layer, site) for layer in range(shape.layers) for site in self.sites]
        x = torch.stack([samples[place][0] for place in places])
        starts = torch.stack([samples[place][1] for place in places])
        r1, notes = self._learn_r1(shape, model, x, starts)
        r2: dict[int, Codec] = {}
        if self.for_r2:
            values = torch.stack([samples[layer, "o_in"][0] for layer in range(shape.layers)])
            learned, more = self._learn_r2(shape, model, values, self.for_r2)
            r2 |= {i: Blocks(matrix) for i, matrix in enumerate(learned)}
            notes |= more
        return Blocks(r1), r2, notes

    def _learn_r1(
        self, shape: ModelShape, model: CalibrationModel, x: Tensor, starts: Tensor
    ) -> tuple[Tensor, dict]:
        """R1 from x [sites, T, n] and starts [sites, W, n]."""
        pieces = list(zip(self._pieces(x), self._pieces(starts)))
        terms, tokens, _ = pieces[0][0].shape
        start = self.draw(shape, shape.hidden, "R1").matrix.dense(torch.float32).to(x.device)
        random = generator(shape.seed, "whip R1")
        steps = self.for_r1.steps(int(self.share * tokens))
        title = f"whip R1, {self.schedule}"
        # one r through all pieces: greedy goes on from where the last layer left it
        r = start
        with _progress(model, title, steps * len(pieces), "r1/whip", terms) as report:
            for piece, first in pieces:
                r = self.for_r1.descend(
                    r, piece, random, steps, _sum_of_whips, report, first, self.sinks
                )
        notes = {
            "schedule": self.schedule,
            "r1_whip": [_mean_whip(x, start), _mean_whip(x, r)],
            "r1_moved": float((r - start).norm()),
            "r1_steps": steps,
        }
        # QR in float32 is orthogonal to float32: what is folded is so to float64
        return project(r.double()).cpu(), notes

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        """x [sites, T, n] cut in pieces [terms of the loss, T, n], to descend on in turn."""
        if self.schedule == "pooled":
            return [x.flatten(0, 1)[None]]
        if self.schedule == "greedy":
            return x[:, None].unbind(0)
        return [x]

    def _learn_r2(
        self, shape: ModelShape, model: CalibrationModel, x: Tensor, calibration: Calibration
    ) -> tuple[Tensor, dict]:
        """R2 [layers, kv_heads, head_dim, head_dim] from o's inputs [layers, T, heads * head_dim].

        The query heads of a key/value head read the same values: their tokens are one sample.
        """
        heads = x.unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
        heads = heads.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [layers, kv_heads, repeat T, head_dim]
        draws = [self.draw(shape, shape.head_dim, i, "R2") for i in range(len(x))]
        # one draw a layer, the same for its heads, from which each goes its own way
        one = torch.stack([draw.matrix.dense(torch.float32) for draw in draws])
        start = one[:, None].expand(-1, shape.kv_heads, -1, -1).to(x.device).contiguous()
        random = generator(shape.seed, "whip R2")
        steps = calibration.steps(heads.shape[2])
        matrices = start.shape[0] * start.shape[1]
        with _progress(model, "whip R2", steps, "r2/whip", matrices) as report:
            # the matrices are independent: the gradient of the sum is each one's own
            r = calibration.descend(
                start, heads, random, steps, lambda r, y: whip(y @ r) * matrices, report
            )
        notes = {"r2_whip": [float(whip(heads @ start)), float(whip(heads @ r))]}
        return project(r.double()).cpu(), notes


def _sum_of_whips(r: Tensor, y: Tensor) -> Tensor:
    """Of y [terms, T, n]: every term counts alike."""
    return sum((whip(term @ r) for term in y), y.new_zeros(()))


def _mean_whip(x: Tensor, r: Tensor) -> float:
    return float(torch.stack([whip(term @ r) for term in x]).mean())


@contextmanager
def _progress(
    model: CalibrationModel, title: str, total: int, curve: str, terms: int
) -> Iterator[Callable[[float], None]]:
    """A stage that yields `report(loss)`, to be called after each step.

    It moves the bar and adds to a curve the mean of the loss's terms, which is what the notes say
    too.
    """
    steps = count(1)
    with model.stage(title, total) as advance:

        def report(loss: float) -> None:
            advance(f"whip {loss / terms:.2f}")
            model.log({curve: loss / terms}, next(steps))

        yield report
