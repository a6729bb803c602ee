"""The names of the files in a checkpoint of this project, and which layout a folder has.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.errors import DataError
from harness.models.facts import read_object

VERSION = 1
RECORD, DIGESTS = "harness.json", "digests.json"


def recorded(folder: Path) -> dict:
    """What harness.json says.

    Raises DataError for a folder of another kind, and for a layout that came later.
    """
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder} is no checkpoint of this project: it has no {RECORD}.")
    record = read_object(folder / RECORD)
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataError(
            f"{folder / RECORD} has layout version {version}, and {VERSION} is the last one known "
            "here; load it with the version of this project that wrote it."
        )
    return record
