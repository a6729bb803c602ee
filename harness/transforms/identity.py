"""identity: no change. The baseline row of every table."""

from __future__ import annotations

from harness.codecs.placement import Placement
from harness.transforms.base import CalibrationModel, ModelShape, Transform


class Identity(Transform):
    """x -> x. INT4 activations per token collapse without a rotation (23.8 % output error measured), so that is warned."""

    def check(self, context: ModelShape) -> list[str]:
        act = context.scheme.act
        if act is not None and act.bits <= 4 and act.granularity == "token":
            return [
                f"transform=identity with {act.bits}-bit activations per token: outlier channels dominate; rotate first"
            ]
        return []

    def fit(self, context: ModelShape, subject: CalibrationModel) -> Placement:
        return Placement()
