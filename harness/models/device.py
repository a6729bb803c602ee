"""Whether this machine has the device that somebody names."""

from __future__ import annotations

import torch

from harness.config.errors import ConfigError


def refuse_missing(field: str, name: str) -> None:
    """Raise ConfigError where a device (auto | cpu | cuda | cuda:N) is a GPU that is not there.

    field: how whoever named it calls it.
    """
    index = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and index >= torch.cuda.device_count():
        raise ConfigError(
            f"{field}={name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            f"use {field}=cpu."
        )
