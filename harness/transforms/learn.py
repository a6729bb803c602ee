"""Learning orthogonal matrices end to end: a loss of the whole model (losses.py), activations quantized, weights frozen.

The live forward (transforms.CalibrationModel.unmerged) applies the codecs to activations with
straight-through quantizers, so no gradient of a weight is ever taken. The matrices of the iterate
with the least loss on held-out windows are returned, the start being one of the candidates: the
loss returned is never above the one begun with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.codecs.placement import Placement
from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.linalg.stiefel import CAPS, CayleySGD, cayley, project
from harness.transforms.base import CalibrationModel
from harness.transforms.losses import loss_of

CHECKS = 8  # how often the held-out loss is taken
OPTIMIZERS = ("cayley", "fixed_point", "cayley_adam")


@dataclass(frozen=True)
class Descent:
    """How the matrices move.

    steps, batch: windows a step. optimizer: cayley (exact steps) | fixed_point (SpinQuant's SGD-G) | cayley_adam (Adam on the
    Cayley parametrization). lr decays to 0 by a cosine. max_angle: most radians a step may turn, null for no cap. cap: tensor
    | block, whose norm bounds a step.
    """

    steps: int
    batch: int
    lr: float
    optimizer: str = "cayley"
    max_angle: float | None = None
    cap: str = "tensor"

    def __post_init__(self):
        integer("transform.steps", self.steps, low=0)
        integer("transform.batch", self.batch)
        number("transform.lr", self.lr, 0, 1e6)
        one_of("transform.optimizer", self.optimizer, OPTIMIZERS)
        one_of("transform.cap", self.cap, CAPS)
        if self.max_angle is not None:
            number("transform.max_angle", self.max_angle, 1e-9, 10)
            if self.optimizer == "cayley_adam":
                raise ConfigError(
                    "transform.max_angle with transform.optimizer=cayley_adam: only Cayley SGD caps its angle; "
                    "set transform.max_angle=null."
                )


class Orthogonal:
    """Named orthogonal matrices [.., n, n] under one optimizer. `matrices()` is differentiable."""

    def __init__(self, start: Mapping[str, Tensor], descent: Descent):
        self.start = {name: matrix.detach().float() for name, matrix in start.items()}
        adam = descent.optimizer == "cayley_adam"
        self.free = {
            n: (torch.zeros_like(m) if adam else m.clone()).requires_grad_()
            for n, m in self.start.items()
        }
        if adam:
            self.matrices = lambda: {
                name: cayley(self.start[name], a) for name, a in self.free.items()
            }
            self.optimizer = torch.optim.Adam(self.free.values(), lr=descent.lr)
        else:
            method = "exact" if descent.optimizer == "cayley" else "fixed_point"
            self.matrices = lambda: self.free
            self.optimizer = CayleySGD(
                self.free.values(),
                descent.lr,
                method=method,
                cap=descent.cap,
                max_angle=descent.max_angle,
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(1, descent.steps)
        )

    def step(self) -> None:
        """One step along the gradients gathered since the last."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """The matrices now, float32."""
        return {name: matrix.clone() for name, matrix in self.matrices().items()}


class Best:
    """Keeps the matrices with the least held-out loss; the start is the first candidate."""

    def __init__(self, moving: Orthogonal, loss: float, steps: int):
        self.steps = steps
        self.matrices, self.step, self.first, self.loss = moving.snapshot(), 0, loss, loss

    def due(self, step: int) -> bool:
        """Whether the held-out loss is to be taken after this step: CHECKS times, and at the end."""
        return step % max(1, self.steps // CHECKS) == 0 or step == self.steps

    def offer(self, step: int, matrices: dict[str, Tensor], loss: float) -> None:
        """A candidate."""
        if loss < self.loss:
            self.matrices, self.step, self.loss = matrices, step, loss

    def projected(self) -> dict[str, Tensor]:
        """The best matrices on the group exactly, float64 on the CPU."""
        return {name: project(matrix.double()).cpu() for name, matrix in self.matrices.items()}


def end_to_end(
    subject: CalibrationModel,
    scheme: Scheme,
    start: Mapping[str, Tensor],
    build: Callable[[Mapping], Placement],
    descent: Descent,
    objective: str,
) -> tuple[dict[str, Tensor], dict]:
    """Learned matrices, projected onto the group in float64, and notes on how it went.

    scheme: what is quantized in the loop, never weights; start: {name: orthogonal [.., n, n]}; build: matrices -> Placement;
    objective: lm | kd. Raises FloatingPointError when the loss is not finite.
    """
    moving = Orthogonal(
        {name: matrix.to(subject.device) for name, matrix in start.items()}, descent
    )
    first = last = None
    teacher = Teacher(subject) if objective == "kd" else None
    again = descent.steps * descent.batch > len(subject.train)
    held = held_out_loss(subject, scheme, build(moving.snapshot()), teacher)
    best = Best(moving, held, descent.steps)
    with subject.stage(f"learning ({objective}, held out {held:.4f})", descent.steps) as advance:
        for step in range(1, descent.steps + 1):
            windows = subject.train[
                torch.arange((step - 1) * descent.batch, step * descent.batch) % len(subject.train)
            ]
            last = 0.0
            for ids in windows.split(
                1
            ):  # one window at a time: memory does not grow with the batch
                target = teacher and teacher.logits(ids, again)
                with subject.unmerged(build(moving.matrices()), scheme):
                    loss = loss_of(subject.logits(ids), ids, target) / len(windows)
                    loss.backward()
                last += float(loss.detach())
            if not math.isfinite(last):
                raise FloatingPointError(
                    f"the {objective} loss is {last} in step {step} of {descent.steps}: lower transform.lr={descent.lr} or "
                    f"transform.max_angle={descent.max_angle}, start from a Hadamard matrix (INT4) or identity (NVFP4), and "
                    "check that the format does not clip too far"
                )
            first = last if first is None else first
            moving.step()
            point = {"learn/loss": last}
            if best.due(step):
                matrices = moving.snapshot()
                held = point["learn/held_out"] = held_out_loss(
                    subject, scheme, build(matrices), teacher
                )
                best.offer(step, matrices, held)
            subject.log(point, step)
            advance(f"loss {last:.4f}, held out {held:.4f}, best {best.loss:.4f}")
    notes = {
        "objective": objective,
        "steps": descent.steps,
        "tokens_a_step": descent.batch * subject.train.shape[1],
        "train_loss": [first, last],
        "held_out_loss": [best.first, best.loss],
        "best_step": best.step,
    }
    return best.projected(), notes


class Teacher:
    """The unquantized model. Of windows that come again its final hidden states are kept, a small part of the logits they make,
    and the forward is saved."""

    def __init__(self, subject: CalibrationModel):
        self.subject, self.kept = subject, {}

    @torch.no_grad()
    def logits(self, ids: Tensor, again: bool) -> Tensor:
        """Logits [B, L, V] of ids [B, L]; again: whether to keep what a second call needs."""
        key = ids.numpy(force=True).tobytes()
        hidden = self.kept.get(key)
        if hidden is None:
            hidden = self.subject.hidden(ids)
            if again:
                self.kept[key] = hidden
        return self.subject.head(hidden)


@torch.no_grad()
def held_out_loss(
    subject: CalibrationModel, scheme: Scheme, placement: Placement, teacher: Teacher | None
) -> float:
    """Mean loss of a placement on the held-out windows: kd with a teacher, lm without."""
    total = 0.0
    for ids in subject.held.split(1):
        target = teacher and teacher.logits(ids, again=True)
        with subject.unmerged(placement, scheme):
            total += float(loss_of(subject.logits(ids), ids, target))
    return total / len(subject.held)
