"""Where options are: folders of `group/option.yaml`.

    ours           conf/ and sweeps/ of a checkout; inside the package where that is installed
    plug-ins'      of other installed packages (plugins.py)
    one's own      the folder that the environment variable HARNESS_CONF names

search_path.py tells Hydra.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.config.paths import expanded
from harness.config.plugins import plugins

PACKAGE = Path(__file__).resolve().parent.parent
OWN = "HARNESS_CONF"


def checkout() -> Path | None:
    """The folder of the sources that run; None where the package is installed."""
    return None if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def conf() -> Path:
    """Our own options, config.yaml among them."""
    return (checkout() or PACKAGE) / "conf"


def elsewhere() -> dict[Path, str]:
    """{folder: who offers what is in it} of options that are not ours.

    Raises ConfigError for a folder that is none.
    """
    folders = {plugin.folder: plugin.release for plugin in plugins()}
    own = os.environ.get(OWN)
    if own:
        folder = expanded(own).absolute()
        if not folder.is_dir():
            raise ConfigError(f"{OWN}={own}: is no folder; name one with files GROUP/OPTION.yaml.")
        folders[folder] = OWN
    return folders


def known(group: str) -> list[str]:
    """The options of a group."""
    return sorted({path.stem for each in _folders(group) for path in each.glob("*.yaml")})


def groups() -> list[str]:
    """What options there are of."""
    folders = [conf(), *elsewhere()]
    inside = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    return sorted(inside | {"sweeps"})


def has(group: str, name: str) -> bool:
    """Whether there is such an option."""
    return any((folder / f"{name}.yaml").is_file() for folder in _folders(group))


def file(group: str, name: str) -> Path:
    """An option's file. Raises ConfigError where there is no such option."""
    for folder in _folders(group):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise ConfigError(missing(group, name))


def missing(group: str, name: str) -> str:
    """What is said of an option that there is not."""
    options = known(group)
    return f"{group}={name}: no such option.{nearest(name, options)} Options: {', '.join(options)}."


def _folders(group: str) -> list[Path]:
    """Where options of a group may be."""
    ours = conf().parent if group == "sweeps" else conf()
    return [folder / group for folder in (ours, *elsewhere())]
