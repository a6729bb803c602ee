"""Talking to a checkpoint in a terminal."""
