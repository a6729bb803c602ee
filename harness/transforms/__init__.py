"""Transforms learn or draw matrices; harness/codecs/fold.py merges them.

A new one is one file here and one in conf/transform.
"""

from harness.codecs.codec import Blocks, Codec, Diagonal, Kronecker, Permutation, Rotation
from harness.codecs.composed import Chain, Repeated, Rows
from harness.codecs.fold import fold, merge
from harness.codecs.placement import Placement, Role
from harness.transforms.base import ModelShape, Transform, generator
from harness.transforms.calibration_model import CalibrationModel

__all__ = [
    "Blocks",
    "CalibrationModel",
    "Chain",
    "Codec",
    "Diagonal",
    "Kronecker",
    "ModelShape",
    "Permutation",
    "Placement",
    "Repeated",
    "Role",
    "Rotation",
    "Rows",
    "Transform",
    "fold",
    "generator",
    "merge",
]
