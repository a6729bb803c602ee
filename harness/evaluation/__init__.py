"""What a model is worth: evaluations, the records they give, and what must be said of them."""
