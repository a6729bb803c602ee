"""Transforms learn or draw matrices; fold.py merges them. A new one is one file here and one in conf/transform."""

from harness.transforms.base import Context, Subject, Transform, generator
from harness.transforms.codec import Blocks, Chain, Codec, Diagonal, Kronecker, Repeated, Rotation
from harness.transforms.fold import fold, merge
from harness.transforms.placement import Placement, Role

__all__ = ["Blocks", "Chain", "Codec", "Context", "Diagonal", "Kronecker", "Placement", "Repeated", "Role", "Rotation",
           "Subject", "Transform", "fold", "generator", "merge"]
