"""Settings: classes built from them, checks of single values, the errors a user can cause.

Imports no torch.
"""
