"""Orthogonal matrices and their fast products: tensors in, tensors out, no model in sight."""

from harness.linalg.hadamard import Hadamard, factors, hadamard, random_signs

__all__ = ["Hadamard", "factors", "hadamard", "random_signs"]
