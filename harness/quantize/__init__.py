"""A placed model becomes a quantized one: blocks, embeddings, the formats of single linears."""
