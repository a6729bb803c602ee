"""Models: where a model comes from, how its family is built, and the modules that replace its linears and attention."""
