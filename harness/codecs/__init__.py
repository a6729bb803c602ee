"""Codecs (invertible maps of a feature axis), where they are placed, and how they are folded into weights."""
