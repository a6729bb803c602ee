"""Calibration: the texts, the token windows cut from them, and what is measured while they stream
through the model.
"""
