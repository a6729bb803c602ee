"""Where the numbers of a run go: always into local files, and to Weights & Biases if wished."""

import logging
from collections.abc import Sequence

from harness.config.extras import installed, lacking
from harness.tracking.base import RunInfo, Several, Tracker
from harness.tracking.local import Local
from harness.tracking.wandb import Wandb

log = logging.getLogger(__name__)

__all__ = ["Local", "RunInfo", "Several", "Tracker", "Trackers", "Wandb"]


class Trackers(Several):
    """What runs beside the local files, from the fields of `conf/tracking/`: W&B where `wandb` says
    so and it is installed.

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
        self._missing = wandb and not installed("wandb")
        super().__init__([mirror] if wandb and not self._missing else [])

    def start(self, config: dict, run: RunInfo) -> None:
        # a sweep says it once, with its page
        if self._missing and (run.group is None or run.job_type == "sweep"):
            log.warning("results stay in local files; %s", lacking("wandb", "tracking=wandb"))
        super().start(config, run)
