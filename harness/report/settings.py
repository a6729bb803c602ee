"""The settings of stored runs, and what tells two points of a sweep apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from harness.tracking.base import without_secrets

# Ten times faster, where PyYAML was built with it.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Of these no number depends on; the last one stood in the settings of every model.
SILENT = {"run_root", "tracking", "on_error", "force", "model.trust_remote_code"}
# {choice that has no column of its own: the option of runs from before there was one}
GROUPS = {"data": None, "eval": None, "export": None, "recipe": None, "tune": "none"}


def publishable(row: Mapping) -> dict:
    """A row's config.yaml without what is secret; empty where it cannot be read."""
    try:
        config = yaml.load((Path(row["path"]) / "config.yaml").read_text(encoding="utf-8"), LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(config, dict):
        return {}
    return without_secrets(config)


def dotted(row: Mapping) -> dict[str, str]:
    """{dotted key: value as typed} of a row's `publishable` settings."""
    return dict(_leaves(publishable(row)))


def seedless(row: Mapping) -> tuple:
    """What a run was, but for its seed: equal for runs that nothing else tells apart."""
    compared = _compared(row["choices"], dotted(row))
    compared.pop("seed", None)
    # of a run without settings nothing is known but itself
    return tuple(sorted(compared.items())) or (row["run_id"],)


def apart(
    rows: Sequence[Mapping], settings: Sequence[Mapping[str, str]], columns: Collection[str] = ()
) -> list[str]:
    """For each row, with its dotted settings, `seed=1 weight.group_size=32`: what differs between
    runs of one recipe that chose the same option of the setting's group.

    What an option brings with it follows from the choice and is left out, as is a value that more
    than half of the comparable runs have. A setting that a run has not is null. Runs without
    settings get nothing, choices that stand in `columns` are not said again. Keys are cut to their
    last two words where these name one setting only.
    """
    runs = [_compared(row["choices"], own) for row, own in zip(rows, settings)]
    telling: list[dict[str, str]] = [{} for _ in runs]
    for key in sorted({key for run in runs for key in run} - set(columns)):
        group, dot, _ = key.partition(".")
        alike = defaultdict(list)
        for index, run in enumerate(runs):
            if run:
                choices = rows[index]["choices"]
                option = choices.get(group) if dot else None
                recipe = None if key == "recipe" else choices.get("recipe")
                alike[recipe, option].append(index)
        for indices in alike.values():
            values = [runs[index].get(key, "null") for index in indices]
            shares = Counter(values)
            for index, value in zip(indices, values):
                if 2 * shares[value] <= len(indices):
                    telling[index][key] = value
    short = _shortened({key for own in telling for key in own})
    return [" ".join(f"{short[key]}={value}" for key, value in own.items()) for own in telling]


def _compared(choices: Mapping[str, str | None], settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that can tell a run from another, with the choices that stand in no column;
    empty ones are not set."""
    if not settings:
        return {}
    compared = {
        key: value
        for key, value in settings.items()
        if value != "{}" and SILENT.isdisjoint((key, key.partition(".")[0]))
    }
    for group, before in GROUPS.items():
        option = choices.get(group, before)
        if option:
            compared[group] = option
    return compared


def _shortened(keys: Collection[str]) -> dict[str, str]:
    """{key: its last two words, or all of it where another key has the same}."""
    ends = {key: ".".join(key.split(".")[-2:]) for key in keys}
    shared = Counter(ends.values())
    return {key: end if shared[end] == 1 else key for key, end in ends.items()}


def _leaves(value, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif key:
        yield (
            key,
            value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False),
        )
