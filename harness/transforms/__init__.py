"""Transforms learn or draw matrices; fold.py merges them. A new one is one file here and one in conf/transform."""

from harness.codecs.codec import Blocks, Chain, Codec, Diagonal, Kronecker, Repeated, Rotation
from harness.codecs.fold import fold, merge
from harness.codecs.placement import Placement, Role
from harness.transforms.base import Context, Subject, Transform, generator

__all__ = ["Blocks", "Chain", "Codec", "Context", "Diagonal", "Kronecker", "Placement", "Repeated", "Role", "Rotation",
           "Subject", "Transform", "fold", "generator", "merge"]
