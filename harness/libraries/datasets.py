"""datasets, its insides: the builder that reads a set from the local cache, without the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its import takes longer than finding a finished run may
    from datasets import DatasetBuilder


def cached_builder(dataset: str, config: str) -> DatasetBuilder | None:
    """The builder of a set that was downloaded before, or None."""
    from datasets.packaged_modules.cache.cache import Cache

    name = dataset.split("/")[-1]
    try:
        return Cache(
            repo_id=dataset, dataset_name=name, config_name=config, version="auto", hash="auto"
        )
    except ValueError:  # nothing that fits is there
        return None


def offline() -> bool:
    """Whether the environment forbids the hub."""
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)
