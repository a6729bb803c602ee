"""lm-eval's own command with checkpoints of this project as a model of it."""
