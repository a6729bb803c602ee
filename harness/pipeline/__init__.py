"""One run, from its settings to its numbers: planned, built, computed stage by stage, stored."""
