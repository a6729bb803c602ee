"""All options as one search path of Hydra's.

An option stands once: a second file of its name is refused, whoever it is from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from harness.config.errors import ConfigError
from harness.config.options import conf, elsewhere


@contextmanager
def composing() -> Iterator[None]:
    """Within it `hydra.compose("config", overrides)` composes of all options.

    Raises ConfigError for a name that stands twice.
    """
    extend()
    with initialize_config_dir(str(conf()), job_name="run", version_base="1.3"):
        yield


def extend() -> None:
    """Have Hydra find all options in this process. Raises ConfigError like `composing`."""
    ours = conf().parent
    files = {path.relative_to(ours): "harness" for path in (ours / "sweeps").glob("*.yaml")}
    for folder, who in {conf(): "harness", **elsewhere()}.items():
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder)
            if name in files:
                raise ConfigError(
                    f"{path}: {files[name]} has an option {name.with_suffix('')} already; "
                    "call this one otherwise."
                )
            files[name] = who
    # conf/config.yaml looks there for sweeps/, which Hydra's help would list with all else inside
    os.environ["HARNESS_ROOT"] = str(ours)
    Plugins.instance().register(Elsewhere)


class Elsewhere(SearchPathPlugin):
    """Puts what is not ours behind what is ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder, who in elsewhere().items():
            search_path.append(who, f"file://{folder}")
