"""Folders that hold a quantized model.

How each layout is written, named, described, and read again.
"""
