"""The command line; nothing here imports torch."""
