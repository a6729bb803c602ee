"""The loop of whatever learns through the whole model: steps, held-out losses, the best iterate.

    step 1 .. S      the loss of a batch of training windows, one at a time, then a step along it
    every S/8 steps  the loss on the held-out windows

The values with the least held-out loss are returned, the start being one of the candidates: the
loss returned is never above the one begun with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harness.parallel import Ranks
from harness.parallel.gradients import add_gradients

CHECKS = 8  # how often the held-out loss is taken

# ids [1, L], whether they come again -> the loss, a scalar
Loss = Callable[[Tensor, bool], Tensor]


class Moving(Protocol):
    """What is learned."""

    def step(self) -> None:
        """One step along the gradients gathered since the last."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """The values now, as copies."""
        ...

    def leaves(self) -> Sequence[Tensor]:
        """The tensors whose gradients are gathered."""
        ...


class Text(Protocol):
    """What a CalibrationModel has to learn from: token ids [N, L] each, a progress bar, curves.

    held_from: the number of the first held-out window in the text. ranks: who learns from it, each
    from the windows whose numbers it owns.
    """

    train: Tensor
    held: Tensor
    held_from: int
    ranks: Ranks

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...

    def log(self, values: dict, step: int) -> None: ...


class Best:
    """Keeps the values with the least held-out loss; the start is the first candidate.

    reached: the latest step whose held-out loss was taken. train: the first step's loss and the
    latest one's.
    """

    def __init__(self, moving: Moving, loss: float, steps: int):
        self.steps = steps
        self.values = moving.snapshot()
        self.step = 0
        self.first = loss
        self.loss = loss
        self.reached = 0
        self.train: list[float] = []

    def due(self, step: int) -> bool:
        """Whether the held-out loss is to be taken after a step: CHECKS times, and at the end."""
        return step % max(1, self.steps // CHECKS) == 0 or step == self.steps

    def offer(self, step: int, values: dict[str, Tensor], loss: float) -> None:
        """A candidate."""
        self.reached = step
        if loss < self.loss:
            self.values = values
            self.step = step
            self.loss = loss


@dataclass(frozen=True)
class Course:
    """steps, of `batch` windows each. name: of the loss. curve: the family its points are logged
    under. advice: what to do where the loss is not finite."""

    steps: int
    batch: int
    name: str
    curve: str
    advice: str


def descend(
    text: Text,
    moving: Moving,
    loss: Loss,
    course: Course,
    begun: Best | None = None,
    checked: Callable[[Best], None] = lambda best: None,
) -> Best:
    """The best values, and how it went.

    begun: an earlier attempt, whose `moving` stands where it was at `begun.reached`. checked: told
    after each held-out loss. Raises FloatingPointError when the loss is not finite.
    """
    steps = course.steps
    # else every window is passed once, and keeping what the teacher said would only cost memory
    again = steps * course.batch > len(text.train)
    best = begun or Best(moving, held_out(text, loss), steps)
    held = best.loss
    with text.stage(f"learning ({course.name}, held out {held:.4f})", steps) as advance:
        for step in range(best.reached + 1, steps + 1):
            indices = torch.arange((step - 1) * course.batch, step * course.batch)
            # in turn, and from the start again when all were seen
            places = (indices % len(text.train)).tolist()
            total = 0.0
            # one window at a time: memory does not grow with the batch
            for place in filter(text.ranks.owns, places):
                part = loss(text.train[place : place + 1], again) / len(places)
                part.backward()
                total += float(part.detach())
            total = sum(text.ranks.gather(total))
            add_gradients(moving.leaves(), text.ranks)
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"the {course.name} loss is {total} in step {step} of {steps}: {course.advice}"
                )
            best.train = [*best.train[:1], total]
            moving.step()
            point = {f"{course.curve}/loss": total}
            if best.due(step):
                held = held_out(text, loss)
                point[f"{course.curve}/held_out"] = held
                best.offer(step, moving.snapshot(), held)
                checked(best)
            text.log(point, step)
            advance(f"loss {total:.4f}, held out {held:.4f}, best {best.loss:.4f}")
    return best


@torch.no_grad()
def held_out(text: Text, loss: Loss) -> float:
    """The mean loss on the held-out windows."""
    windows = enumerate(text.held.split(1), text.held_from)
    own = sum(float(loss(ids, True)) for number, ids in windows if text.ranks.owns(number))
    return sum(text.ranks.gather(own)) / len(text.held)
