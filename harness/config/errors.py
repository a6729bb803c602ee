"""The errors a user can cause.

Each message names the fields, the offending values and a way out.
"""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work.

    Raised before any weight is loaded.
    """


class DataError(ValueError):
    """A text, model or weight that cannot be used: missing, empty, unreachable, or not finite."""
