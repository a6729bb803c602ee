"""Which stored runs the words of a command line name.

A run root, `group=option` filters, parts of run ids.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.errors import ConfigError
from harness.report.rows import LABELS


def root_and_filters(words: list[str]) -> tuple[Path, list[str]]:
    """The run root and the filters among the words. Raises ConfigError."""
    root, _ = root_and_runs([word for word in words if "=" not in word], 0)
    return root, [word for word in words if "=" in word]


def root_and_runs(words: list[str], count: int) -> tuple[Path, list[str]]:
    """The run root, if the words begin with one, and `count` names of runs. Raises ConfigError."""
    if len(words) not in (count, count + 1):
        raise ConfigError(
            f"{' '.join(words) or 'nothing given'}: needs {count or 'no'} run ids, after the run "
            "root if any."
        )
    root = Path(words[0] if len(words) > count else "runs")
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; give the run root.")
    return root, words[len(words) - count :]


def filtered(rows: list[dict], filters: list[str]) -> list[dict]:
    """Rows of which all `group=option,option` hold, `status` counting as a group. Raises
    ConfigError for another one."""
    groups = {"status", *LABELS, *(group for row in rows for group in row["labels"])}
    for group, _, options in (text.partition("=") for text in filters):
        if group not in groups:
            raise ConfigError(
                f"{group}={options}: no such filter; there are {', '.join(sorted(groups))}."
            )
        rows = [
            row
            for row in rows
            if (row["labels"] | {"status": row["status"]}).get(group) in options.split(",")
        ]
    return rows


def find(rows: list[dict], part: str) -> dict:
    """The one run whose id is `part` or contains it. Raises ConfigError with the candidates."""
    exact = [row for row in rows if row["run_id"] == part]
    matches = exact or [row for row in rows if part in row["run_id"]]
    if len(matches) == 1:
        return matches[0]
    candidates = ", ".join(row["run_id"] for row in (matches or rows)[-8:]) or "none"
    what = f"{len(matches)} runs match, e.g." if matches else "no such run; the latest are"
    raise ConfigError(f"{part}: {what} {candidates}.")


def unrecorded(row: dict) -> str:
    """What stands where the command of a run is not known."""
    return f"not recorded; the settings are in {Path(row['path']) / 'config.yaml'}"


def short_id(row: dict) -> str:
    """The end of a run id, by which tables name a run."""
    return row["run_id"][-10:]
