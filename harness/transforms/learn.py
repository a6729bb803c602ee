"""Learning orthogonal matrices end to end: a loss of the whole model (losses.py), weights frozen.

The live forward (CalibrationModel.unmerged) applies the codecs to activations, with
straight-through quantizers, so no gradient of a weight is ever taken. The loop is loop.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.codecs.placement import Placement
from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.linalg.stiefel import CAPS, CayleySGD, cayley, project
from harness.transforms import loop
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.losses import loss_of

OPTIMIZERS = ("cayley", "fixed_point", "cayley_adam")


@dataclass(frozen=True)
class Descent:
    """How the matrices move.

    steps. batch: windows a step.
    optimizer: cayley (exact steps) | fixed_point (SpinQuant's SGD-G) | cayley_adam (Adam on the
        Cayley parametrization).
    lr: decays to 0 by a cosine.
    max_angle: most radians a step may turn, null for no cap.
    cap: tensor | block, whose norm bounds a step.
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
                    "transform.max_angle with transform.optimizer=cayley_adam: only Cayley SGD "
                    "caps its angle; set transform.max_angle=null."
                )


class Orthogonal:
    """Named orthogonal matrices [.., n, n] under one optimizer."""

    def __init__(self, start: Mapping[str, Tensor], descent: Descent):
        self.start = {name: matrix.detach().float() for name, matrix in start.items()}
        self.adam = descent.optimizer == "cayley_adam"
        # the matrices themselves, or the skew-symmetric ones that parametrize them, zero at first
        first = torch.zeros_like if self.adam else torch.clone
        self.free = {name: first(matrix).requires_grad_() for name, matrix in self.start.items()}
        if self.adam:
            self.optimizer = torch.optim.Adam(self.free.values(), lr=descent.lr)
        else:
            self.optimizer = CayleySGD(
                self.free.values(),
                descent.lr,
                method="exact" if descent.optimizer == "cayley" else "fixed_point",
                cap=descent.cap,
                max_angle=descent.max_angle,
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(1, descent.steps)
        )

    def matrices(self) -> dict[str, Tensor]:
        """The matrices now, float32, differentiable in what moves."""
        if self.adam:
            return {name: cayley(self.start[name], a) for name, a in self.free.items()}
        return self.free

    def step(self) -> None:
        """One step along the gradients gathered since the last."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are gathered."""
        return list(self.free.values())

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """The matrices now, float32, as copies."""
        return {name: matrix.clone() for name, matrix in self.matrices().items()}


class Best(loop.Best):
    """Keeps the matrices with the least held-out loss."""

    def projected(self) -> dict[str, Tensor]:
        """The best matrices on the group exactly, float64 on the CPU."""
        return projected(self.values)


def projected(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices on the group exactly, float64 on the CPU."""
    # steps in float32 leave the group by their rounding, and what is folded is float64
    return {name: project(matrix.double()).cpu() for name, matrix in matrices.items()}


class Teacher:
    """The unquantized model.

    Of windows that come again its final hidden states are kept, a small part of the logits they
    make, and the forward is saved.
    """

    def __init__(self, model: CalibrationModel):
        self.model = model
        self.states: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def logits(self, ids: Tensor, again: bool) -> Tensor:
        """Logits [B, L, V] of ids [B, L]; again: whether to keep what a second call needs."""
        key = ids.numpy(force=True).tobytes()
        hidden = self.states.get(key)
        if hidden is None:
            hidden = self.model.hidden(ids)
            if again:
                self.states[key] = hidden
        return self.model.head(hidden)


def end_to_end(
    model: CalibrationModel,
    scheme: Scheme,
    start: Mapping[str, Tensor],
    build: Callable[[Mapping[str, Tensor]], Placement],
    descent: Descent,
    objective: str,
) -> tuple[dict[str, Tensor], dict]:
    """Learned matrices, projected onto the group in float64, and notes on how it went.

    scheme: what is quantized in the loop, never weights. start: {name: orthogonal [.., n, n]}.
    build: matrices -> Placement. objective: lm | kd. Raises FloatingPointError when the loss is not
    finite.
    """
    moving = Orthogonal({name: matrix.to(model.device) for name, matrix in start.items()}, descent)
    teacher = Teacher(model) if objective == "kd" else None
    course = loop.Course(
        descent.steps,
        descent.batch,
        objective,
        "learn",
        f"lower transform.lr={descent.lr} or transform.max_angle={descent.max_angle}, start from a "
        "Hadamard matrix (INT4) or identity (NVFP4), and check that the format does not clip too "
        "far",
    )

    def loss(ids: Tensor, again: bool) -> Tensor:
        return placed_loss(model, scheme, build(moving.matrices()), teacher, ids, again)

    best = loop.descend(model, moving, loss, course)
    notes = {
        "objective": objective,
        "steps": descent.steps,
        "tokens_a_step": descent.batch * model.train.shape[1],
        "train_loss": [best.train[0], best.train[-1]] if best.train else [None, None],
        "held_out_loss": [best.first, best.loss],
        "best_step": best.step,
    }
    return projected(best.values), notes


def placed_loss(
    model: CalibrationModel,
    scheme: Scheme,
    placement: Placement,
    teacher: Teacher | None,
    ids: Tensor,
    again: bool,
    stored: bool = False,
) -> Tensor:
    """The loss of a placement on ids [B, L]: kd with a teacher, lm without.

    again: whether the ids come again. stored: whether weights are read as they would be stored.
    """
    target = teacher and teacher.logits(ids, again)
    with model.unmerged(placement, scheme, stored):
        return loss_of(model.logits(ids), ids, target)
