"""Hydra's composition errors in one line that names the field and the nearest names there are."""

from __future__ import annotations

import re

from hydra import compose
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig

from harness.config import options
from harness.config.checks import nearest
from harness.config.command_line import again
from harness.config.search_path import composing


def explain(error: Exception, arguments: list[str]) -> str:
    """A readable message for an error of Hydra or OmegaConf while it composed `arguments`."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read; write group=option or field=value, and quote what "
            "holds spaces or brackets."
        )
    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        return options.missing(*match.groups())
    if match := re.search(r"Interpolation key '(.+)' not found\s+full_key: (\S+)", text):
        return f"{match[2]}=${{{match[1]}}}: there is no setting {match[1]} to take it from."
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    ):
        key = match.group(1)
        known = _known(arguments, key)
        near = nearest(key, [*known, *options.groups()])
        return f"{key}: no such setting.{near} `{again(['--cfg', 'job'])}` lists all."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(dict.fromkeys(lines))


def _known(arguments: list[str], failed: str) -> list[str]:
    """The settings of the chosen options, of each in turn where a sweep goes through several."""
    words = [
        word
        for word in arguments
        if re.fullmatch(r"\w+=[\w,-]+", word) and not word.startswith(f"{failed}=")
    ]
    choices = {
        group: names.split(",") for group, _, names in (word.partition("=") for word in words)
    }
    turns = max(map(len, choices.values()), default=1)
    found = [
        _compose([f"{group}={names[turn % len(names)]}" for group, names in choices.items()])
        for turn in range(turns)
    ]
    return list(dict.fromkeys(key for config in found for key in _keys(config)))


def _compose(choices: list[str]) -> DictConfig:
    """The configuration of some options, or the default one where that cannot be composed."""
    with composing():
        try:
            return compose("config", overrides=choices)
        except HydraException:
            return compose("config")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        if key == "_target_":
            continue
        name = f"{prefix}{key}"
        keys.append(name)
        value = config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            keys += _keys(value, f"{name}.")
    return keys
