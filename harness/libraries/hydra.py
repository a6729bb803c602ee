"""hydra, its insides: splitting the combinations of a sweep, and handing jobs to a launcher.

BasicSweeper.split_arguments    overrides with several values -> the overrides of each job
BasicLauncher                   the one that runs jobs in this process, by which a watcher knows
                                that it is needless
HydraContext, Callbacks         what a launcher is given
"""

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext

__all__ = ["BasicLauncher", "Callbacks", "HydraContext", "OverridesParser", "jobs_of"]


def jobs_of(overrides: list[Override]) -> list[list[str]]:
    """The overrides of each job, every combination of what parsed overrides hold."""
    # without a limit on their size there is one batch, the first
    return [list(row) for row in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]]
