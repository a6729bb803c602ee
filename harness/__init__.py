"""Quantize a language model with any method x format, and measure what it cost."""

from importlib import import_module


def load(path, device="cpu", dtype=None, packed=False):
    """(model, tokenizer) of a checkpoint of `export=harness`: see harness/checkpoints/native.py."""
    return import_module("harness.checkpoints.native").load(path, device, dtype, packed)
