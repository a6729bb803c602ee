"""Where the numbers of a run go: always into local files, and to Weights & Biases if wished."""

from collections.abc import Sequence

from harness.tracking.base import RunInfo, Several, Tracker
from harness.tracking.local import Local
from harness.tracking.wandb import Wandb

__all__ = ["Local", "RunInfo", "Several", "Tracker", "Trackers", "Wandb"]


class Trackers(Several):
    """What runs beside the local files, from the fields of `conf/tracking/`: W&B where `wandb` says
    so.

    Raises ConfigError for a value that cannot work.
    """

    def __init__(
        self,
        wandb: bool = True,
        entity: str | None = None,
        project: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        tags: Sequence[str] = (),
    ):
        mirror = Wandb(project=project, entity=entity, name=name, mode=mode, tags=tags)
        super().__init__([mirror] if wandb else [])
