"""The errors a user can cause: messages name the fields, the offending values and a way out."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, or a combination of some, that cannot work; raised before any weight is loaded."""


class DataError(ValueError):
    """A text, model or weight that cannot be used: missing, empty, unreachable, or not finite."""


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line and without its full stop, or its name."""
    text = " ".join(str(error).split()).rstrip(".")
    # of a missing key the text is the key alone
    named = not text or isinstance(error, LookupError)
    return f"{type(error).__name__} {text}".strip() if named else text
