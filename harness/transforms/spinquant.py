"""spinquant: R1 and R2 learned through the whole model with quantized activations; R3, R4 random Hadamard (rotations.py).

    min over R1, R2_1 .. R2_L in O(n)  of  L(model with Q_a(x R)),    Cayley SGD from random Hadamard matrices

Weights stay float in the loop (W16A4), which is what a GPTQ evaluation needs. Source: SpinQuant (arXiv 2405.16406), whose loss
is the language model's own (objective=lm) and whose step is bounded only by 1/||W||_1 (preset spinquant_paper: lr 1.5, SGD-G's
fixed point, 100 steps of 8 x 2048 tokens, linear decay in the paper, cosine here). The default is ours: distillation, exact
Cayley steps of at most `max_angle` radians, a budget for two CPU cores. Exact: every R leaves the float model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.placement import Placement
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.linalg.stiefel import deviation
from harness.transforms.base import CalibrationModel, ModelShape
from harness.transforms.learn import Descent, end_to_end
from harness.transforms.quarot import QuaRot


class SpinQuant(QuaRot):
    """objective: lm | kd; the other knobs of learning are those of learn.Descent, of the places those of quarot."""

    learned = True

    def __init__(
        self,
        objective: str,
        steps: int,
        batch: int,
        lr: float,
        optimizer: str = "cayley",
        max_angle: float | None = None,
        cap: str = "tensor",
        r1: str | int | bool = "hadamard",
        r2: bool = True,
        r3: str | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        super().__init__(r1, r2, r3, r4, random_signs=random_signs)
        self.objective = one_of("transform.objective", objective, ("lm", "kd"))
        if self.r1 == "off" and not self.r2:
            raise ConfigError(
                "transform.r1=off with transform.r2=false: no rotation is left to learn; leave one of them on."
            )
        self.descent = Descent(steps, batch, lr, optimizer, max_angle, cap)

    def check(self, context: ModelShape) -> list[str]:
        self.needs_activations(context)
        return super().check(context)

    def start(self, context: ModelShape, subject: CalibrationModel) -> dict[str, Tensor]:
        """{R1 [hidden, hidden], R2 [layers, head_dim, head_dim]}, random Hadamard, float64."""
        r1, r2, _ = super().matrices(context, subject)
        start = (
            {} if r1 is None else {"R1": r1.encode(torch.eye(context.hidden, dtype=torch.float64))}
        )
        if r2:
            start["R2"] = torch.stack([codec.matrix.dense() for codec in r2.values()])
        return start

    def build(
        self, context: ModelShape, subject: CalibrationModel, matrices: Mapping[str, Tensor]
    ) -> Placement:
        """Where such matrices go."""
        return self.placement(context, *_codecs(matrices), {})

    def matrices(
        self, context: ModelShape, subject: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        scheme, build = context.scheme.seen("act", "kv"), partial(self.build, context, subject)
        learned, notes = end_to_end(
            subject, scheme, self.start(context, subject), build, self.descent, self.objective
        )
        return *_codecs(learned), notes | {
            "orthogonality": max(deviation(matrix) for matrix in learned.values())
        }


def _codecs(matrices: Mapping[str, Tensor]) -> tuple[Codec | None, dict[int, Codec]]:
    r1 = Blocks(matrices["R1"]) if "R1" in matrices else None
    return r1, {
        i: Blocks(matrix) for i, matrix in enumerate(matrices.get("R2", torch.empty(0)).unbind(0))
    }
