"""The names of the files in a checkpoint of this project, and which layout a folder has.

config.json keeps other libraries from taking it for a float model, whose weights they would not
find and draw: it names a quantization method that only this project registers, and, as transformers
goes on without a method it does not know, a weight file that transformers refuses by showing its
name. Folders from before that have neither.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.errors import DataError
from harness.structure.facts import read_object

VERSION = 1
RECORD, DIGESTS = "harness.json", "digests.json"
PLACEMENT = "placement.safetensors"
METHOD = "harness"
WAY_OUT = (
    "a harness checkpoint; `import harness` before from_pretrained, or use harness.load(folder)"
)


def guard() -> dict[str, object]:
    """What of config.json keeps others away."""
    return {"quantization_config": {"quant_method": METHOD}, "transformers_weights": WAY_OUT}


def unguard(config: object, method: bool = True) -> None:
    """Take that out of a config that was read; method: the method, too."""
    vars(config).pop("transformers_weights", None)
    if method:
        vars(config).pop("quantization_config", None)


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
