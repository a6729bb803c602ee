"""Our checkpoints in the engines that serve models."""
