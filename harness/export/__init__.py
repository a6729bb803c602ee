"""What leaves a run: encodings of its weights."""
