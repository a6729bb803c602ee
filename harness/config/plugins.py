"""Options of other packages: a YAML each in a folder conf/, classes beside it, no fork.

A package announces itself by an entry point of the group `harness.plugins`, whose value is a module
or a package that holds the folder (or lies beside it). In its pyproject.toml:

    [project.entry-points."harness.plugins"]
    flips = "flips"                               # flips/conf/transform/flip.yaml

Nothing of it is imported to find its options: its code runs when a class of it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import yaml

from harness.config.errors import ConfigError, reason

GROUP = "harness.plugins"


@dataclass(frozen=True)
class Plugin:
    """An installed package that offers options.

    release: its distribution and version; package: its importable name; folder: its conf/.
    """

    release: str
    package: str
    folder: Path

    def targets(self, group: str) -> list[str]:
        """The classes that its options of a config group name.

        Raises ConfigError naming a file that cannot be read.
        """
        found = []
        for file in sorted((self.folder / group).glob("*.yaml")):
            try:
                found += _targets(yaml.safe_load(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, yaml.YAMLError) as error:
                why = reason(error)  # YAML's own takes several lines
                raise ConfigError(
                    f"{file}: cannot be read as YAML ({why}); install {self.release} anew, or "
                    "remove it."
                ) from None
        return found


@cache  # a process computes with what is installed when it starts
def plugins() -> tuple[Plugin, ...]:
    """Those that are installed, by name. Raises ConfigError for one that holds no folder conf/."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return tuple(_plugin(entry) for entry in found)


def releases(settings: object) -> list[str]:
    """The plug-ins, each `name==version`, whose classes nested settings name."""
    targets = {target.partition(".")[0] for target in _targets(settings)}
    return sorted({plugin.release for plugin in plugins() if plugin.package in targets})


def _plugin(entry: EntryPoint) -> Plugin:
    package, *inner = entry.module.split(".")
    release = f"{entry.dist.name}=={entry.dist.version}" if entry.dist else entry.name
    spec = find_spec(package)  # of a package by itself: runs no code of it
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    if spec is not None and spec.origin and not places:  # a module that is one file
        places = [str(Path(spec.origin).parent)]
    for place in places:
        for folder in (Path(place, *inner, "conf"), Path(place, *inner[:-1], "conf")):
            if folder.is_dir():
                return Plugin(release, package, folder)
    raise ConfigError(
        f"the installed {release} offers options by {GROUP}={entry.value}, where there is no "
        "folder conf/; install it anew, or remove it."
    )


def _targets(value: object) -> list[str]:
    """Every `_target_` in nested settings."""
    if isinstance(value, Mapping):
        own = value.get("_target_")
        inner = [target for each in value.values() for target in _targets(each)]
        return [own, *inner] if isinstance(own, str) else inner
    if isinstance(value, list | tuple):
        return [target for each in value for target in _targets(each)]
    return []
