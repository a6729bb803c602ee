"""The folder of a checkpoint: whether it can be written, what stands in it whatever the layout, and
the hashes by which it is known again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from harness.checkpoints.base import Exporter, Snapshot
from harness.config.errors import ConfigError, reason
from harness.libraries.transformers import config_json
from harness.models.weights import PROCESSORS
from harness.store import writable, write_json


def check_destination(section: Mapping) -> None:
    """Refuse what would fail only after hours: a folder that is none, a hub that cannot be used.

    Raises ConfigError.
    """
    try:
        folder = isinstance(section["path"], str) and not Path(section["path"]).is_file()
    except OSError as error:
        raise ConfigError(
            f"export.path={section['path']}: {error.strerror}; give another folder."
        ) from None
    if not folder:
        raise ConfigError(f"export.path={section['path']}: needs a folder.")
    writable("export.path", Path(section["path"]))
    if section["push_to"] is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        raise ConfigError(
            f"export.push_to={section['push_to']}: the hub cannot be used ({reason(error)}); "
            "set HF_TOKEN, or export.push_to=null."
        ) from None


def write_checkpoint(exporter: Exporter, snapshot: Snapshot, folder: Path) -> None:
    """Write weights, config.json, generation_config.json, tokenizer, what shows images and sounds
    to a model that takes them, and the layout's own files into an empty folder.
    """
    folder.mkdir(parents=True)
    exporter.write(snapshot, folder)
    model = snapshot.adapter.model
    config = model.config.to_dict() | exporter.config(snapshot)
    # a tower's own word for it would be another
    for part in model.config.sub_configs:
        if isinstance(config.get(part), dict):
            config[part]["dtype"] = config["dtype"]
    # what begins with _ is of this process: where the model came from, for one
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    write_json(folder / "config.json", config_json(public))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    snapshot.tokenizer.save_pretrained(folder)
    if snapshot.towers is not None:
        for file in snapshot.towers.folder.glob(PROCESSORS):
            shutil.copyfile(file, folder / file.name)
    exporter.extras(snapshot, folder)


def digests(folder: Path) -> dict[str, str]:
    """{file: sha256} of everything in a folder, except the record of the digests itself."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "digests.json":
            hashes[path.name] = digest(path)
    return hashes


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
