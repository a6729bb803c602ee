"""Tuners learn what a solver left: they take a solved model closer to the untouched one.

A new one is one file here and one in conf/tune.
"""

from harness.tune.base import Student, Tuned, Tuner

__all__ = ["Student", "Tuned", "Tuner"]
