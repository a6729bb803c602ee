"""Transforms learn or draw matrices; fold.py merges them. A new one is one file here and one in conf/transform."""

from harness.transforms.base import Codec, Context, Placement, Transform, generator
from harness.transforms.fold import fold

__all__ = ["Codec", "Context", "Placement", "Transform", "fold", "generator"]
