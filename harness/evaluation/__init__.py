"""What a model is worth: perplexity, and later zero-shot accuracy and divergence."""
