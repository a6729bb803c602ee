"""Calibration: the texts, the token windows cut from them, and what is measured on them."""
