"""Codecs (invertible maps of a feature axis), their places, and how they fold into weights."""
