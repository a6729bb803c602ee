"""Models: their sources, their families, and the modules swapped into them."""
