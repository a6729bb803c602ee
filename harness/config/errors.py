"""The errors a user can cause: messages name the fields, the offending values and a way out."""


class ConfigError(ValueError):
    """A setting, or a combination of some, that cannot work; raised before any weight is loaded."""


class DataError(ValueError):
    """A text, model or weight that cannot be used: missing, empty, unreachable, or not finite."""
