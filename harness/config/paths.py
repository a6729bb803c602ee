"""A path as a setting or an argument names it, wherever one is first read."""

from __future__ import annotations

import os
from pathlib import Path

from harness.config.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """The path with a home folder in place of the ~ or ~user that it begins with.

    Raises ConfigError for a user that there is not.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = Path(path).parts[0]
        raise ConfigError(f"{path}: nobody is called {user[1:]}; a folder of that name is ./{user}")
    return Path(found)
