"""identity: no change. The baseline row of every table."""

from __future__ import annotations

from harness.codecs.placement import Placement
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel


class Identity(Transform):
    """x -> x."""

    def check(self, shape: ModelShape) -> list[str]:
        act = shape.scheme.act
        # measured with INT4 activations per token: 23.8 % output error without a rotation
        if act is not None and act.bits <= 4 and act.granularity == "token":
            return [
                f"transform=identity with {act.bits}-bit activations per token: "
                "outlier channels dominate; rotate first"
            ]
        return []

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        return Placement()
