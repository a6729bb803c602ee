"""Where the numbers of a run go while it runs: always into local files, and to Weights & Biases if wished."""

from collections.abc import Sequence

from harness.errors import ConfigError
from harness.tracking.base import RunInfo, Several, Tracker
from harness.tracking.local import Local
from harness.tracking.wandb import Wandb

__all__ = ["Local", "RunInfo", "Several", "Tracker", "Wandb", "build"]


def build(
    wandb: bool = True,
    entity: str | None = None,
    project: str | None = None,
    name: str | None = None,
    mode: str | None = None,
    tags: Sequence[str] = (),
) -> Several:
    """The trackers of a run, from the fields of `conf/tracking/`. Raises ConfigError for a value that cannot work."""
    if not isinstance(wandb, bool):
        raise ConfigError(f"tracking.wandb={wandb!r} must be true or false")
    if not isinstance(tags, Sequence) or isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
        raise ConfigError(f"tracking.tags={tags!r} must be a list of words; write tracking.tags=[{tags}]")
    for field, value in (("entity", entity), ("project", project), ("name", name)):
        if not isinstance(value, str | None):
            raise ConfigError(f"tracking.{field}={value} must be a word or null")
    mirror = Wandb(project=project, entity=entity, name=name, mode=mode, tags=tags)
    return Several([Local(), mirror] if wandb else [Local()])
