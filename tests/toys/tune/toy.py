"""s -> s factor: every block scale by a constant, as its grid has it. An example."""

from dataclasses import dataclass, replace

import torch

from harness.formats import weight_format
from harness.tune.base import Student, Tuned, Tuner


@dataclass(frozen=True, kw_only=True)
class Grown(Tuner):
    """Learns nothing. factor: of all scales."""

    factor: float

    def tune(self, student: Student) -> Tuned:
        grown = {}
        for name, q in student.qtensors.items():
            factor = torch.full(q.scales.scale.shape, self.factor)
            grown[name] = replace(q, scales=weight_format(q).rescaled(q.scales, factor))
        return Tuned(grown, {}, {"grown": self.factor})
