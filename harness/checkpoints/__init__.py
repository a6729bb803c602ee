"""Folders that hold a quantized model: how each layout is written, named, described, and read again."""
