"""Sections of the settings that no class is built from whole: which keys they have, of which types.

config/build.py has those that stand in every configuration, and checks them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.config.checks import known_keys, one_of, typed
from harness.config.errors import ConfigError

SERVES = {  # what an export may say of how its engine computes, whatever the format
    "scale_dtype": ("float32", "bf16", "fp16", "input"),
    "compute_dtype": ("float32", "input"),
    "zp_order": ("round_then_add", "add_then_round"),
    "zp_range": ("unsigned", "signed"),
}
EXPORT = {  # common to all exporters; what else an option has goes to its class
    "name": str,
    "_target_": str,
    "path": str,
    **dict.fromkeys(("base", "dataset", "training", "peft"), str | None),
    "push_to": str | None,
    "serves": Mapping[str, Mapping[str, str]],
}


def check_fixed(
    settings: Mapping, choices: Mapping[str, str | None], overrides: Sequence[str]
) -> None:
    """Refuse what looks like a setting and is what an option is: its name, its class."""
    for group in ("format", "transform", "solver", "tune", "eval", "export"):
        name = settings[group].get("name")
        if choices.get(group) not in (None, name):
            raise ConfigError(
                f"{group}.name={name}: is no setting, it is what the option is called; "
                f"choose {group}={name}."
            )
    for override in overrides:
        # An override may name the class of a format by which it replaces the run's own.
        if "_target_" in override and not setting_of(override).startswith("format.overrides"):
            raise ConfigError(
                f"{override}: the class is no setting, "
                f"the option of {override.partition('.')[0]} decides it."
            )


def check_export(section: Mapping) -> None:
    """Refuse keys and types that no exporter has in common with the others, or their lack."""
    if section.get("_target_"):
        common = {key: value for key, value in section.items() if key in EXPORT}
        typed("export.", common, EXPORT, needed=EXPORT.keys() - {"serves"})
    else:
        # Formats compute by `serves` whether or not anything is exported.
        known = {name: EXPORT[name] for name in ("name", "serves")}
        typed("export.", section, known, needed=("name",))


def check_serves(section: Mapping) -> None:
    """Refuse words of `export.serves` that no format knows."""
    for part, rules in section.get("serves", {}).items():
        known_keys(f"export.serves.{part}.", rules, SERVES)
        for name, value in rules.items():
            one_of(f"export.serves.{part}.{name}", value, SERVES[name])


def check_files(section: Mapping) -> None:
    """Refuse what is no name of a file among the transform's."""
    files = {name: section[name] for name in ("save", "load") if name in section}
    typed("transform.", files, dict.fromkeys(files, str | None))


def unnamed(section: Mapping) -> dict:
    """A group's settings without the option's name, which no class takes."""
    return {key: value for key, value in section.items() if key != "name"}


def exporter_fields(section: Mapping) -> dict:
    """The settings of `export` that go to the exporter's class, which declares them, and its
    name."""
    common = EXPORT.keys() - {"_target_"}
    return {key: value for key, value in section.items() if key not in common}


def setting_of(override: str) -> str:
    """The setting or group that a word of the command line changes."""
    return override.partition("=")[0].lstrip("+~")
