"""Codecs (invertible maps of a feature axis), where they are placed, and their fold into weights."""
