"""The words every tuner speaks: a Student in, what it learned out.

A tuner comes after the solver and sees the whole model as it is served. It returns tensors; storing
them, putting them into the model and telling people is done for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harness.calibration.subject import StreamedModel
from harness.config.checks import integer
from harness.formats import Format, QTensor
from harness.models.adapter import Adapter
from harness.transforms.learn import Teacher
from harness.transforms.losses import loss_of


class Kept(Protocol):
    """Where a tuner keeps how far it is, so that a killed run goes on from there."""

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """(tensors, plain values) of the latest `save`; None where there is none."""
        ...

    def save(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """Replace what is kept, in one step."""
        ...


@dataclass(frozen=True)
class Student:
    """A solved model as it is served, and the untouched one that it is to follow.

    model: with the calibration text; weights dequantized, activations and the KV cache quantized
    (straight-through where a gradient is taken), transforms online. qtensors: {absolute name:
    QTensor} of the quantized linears of its blocks. solved: {absolute name: the float weight [out,
    in] that was solved}, the tuner's own, to be dropped once it is used; empty where it asks for
    none. teacher: the untouched model. amp: autocast dtype of forwards. kept: for progress.
    """

    model: StreamedModel
    qtensors: Mapping[str, QTensor]
    solved: dict[str, Tensor]
    teacher: Teacher
    amp: torch.dtype | None
    kept: Kept

    @property
    def adapter(self) -> Adapter:
        return self.model.adapter

    def loss(self, ids: Tensor, again: bool) -> Tensor:
        """The mean over tokens of KL(teacher || student) on ids [B, L], a float32 scalar.

        again: whether these ids come again.
        """
        device = self.model.device.type
        with torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            target = self.teacher.logits(ids, again)
            return loss_of(self.model.logits(ids), ids, target)


@dataclass(frozen=True)
class Tuned:
    """What a tuner learned.

    qtensors: as a Student's, the same formats. tensors: {absolute name: values} of parameters and
    buffers that stay float. notes: plain values for the result.
    """

    qtensors: Mapping[str, QTensor]
    tensors: Mapping[str, Tensor]
    notes: Mapping


@dataclass(frozen=True, kw_only=True)
class Tuner(ABC):
    """One way to tune.

    windows: of the calibration text, after those that the solver has seen, to learn from; None:
        the solver's own. What was fitted to those already says little of where weights err.
    """

    windows: int | None = None

    def __post_init__(self):
        integer("tune.windows", self.windows, low=2, optional=True)

    @property
    def unread(self) -> tuple[str, ...]:
        """Settings without effect as the others are set."""
        return ()

    @property
    def needs_solved(self) -> bool:
        """Whether it wants the float weights that were solved, as much memory as the model."""
        return False

    def check(self, formats: Sequence[Format]) -> list[str]:
        """Refuse weight formats that it cannot tune (ConfigError); returns warnings."""
        return []

    @abstractmethod
    def tune(self, student: Student) -> Tuned:
        """What makes the student follow its teacher best; the model may be left in any state.

        Raises FloatingPointError where the loss is not finite.
        """
