"""Quantize a language model with any method x format, and measure what it cost."""
