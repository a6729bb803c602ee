"""Exported checkpoints as a model to measure. Imports no torch before weights are loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harness.errors import ConfigError, DataError
from harness.models.load import ModelSource

VERSION = 1  # of the project's own layout
RECORD, DIGESTS, ABOUT = "harness.json", "digests.json", "quantization_metadata.json"
WORD = re.compile(r"[\w.+-]{1,40}", re.ASCII)  # what an option or a format may be called in a file of others


@dataclass(kw_only=True)
class CheckpointModel(ModelSource):
    """A checkpoint of this project, or a folder in the compressed-tensors layout. It is measured as it is, with what it
    quantizes of activations, keys and values: format=none transform=identity solver=none."""

    quantized = True
    path: str | None = None
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError("model=checkpoint needs model.path: the folder of an exported checkpoint.")
        self.name = self.name or self._folder.name

    def check(self) -> None:
        if not (self._folder / "config.json").is_file():
            raise DataError(f"model.path={self.path}: no such folder with a config.json; give that of an exported checkpoint.")
        if self._own:
            recorded(self._folder)
        elif _method(self.facts()) != "compressed-tensors":
            raise DataError(f"model.path={self.path} has neither a {RECORD} nor a compressed-tensors config; for a model that "
                            f"is not quantized use model=hf model.path={self.path}.")
        elif not any(self._folder.glob("*.safetensors")):
            raise DataError(f"model.path={self.path}: no *.safetensors; pickled weights are not opened.")
        elif find_spec("compressed_tensors") is None:
            raise DataError(f"model.path={self.path} needs compressed-tensors to be read; pip install compressed-tensors")

    def facts(self) -> dict:
        return read(self._folder, "config.json")

    def load(self, device="cpu"):
        import torch

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        if self._own:
            from harness.models.checkpoint import load

            model, tokenizer = load(self._folder, device, dtype)
        else:
            model, tokenizer = _compressed(self._folder, dtype or "auto", device)
        return self.ready(model, device), tokenizer

    def fingerprint(self) -> str:
        self.check()
        digest = hashlib.sha256()
        for file in sorted(self._folder.iterdir()):
            if file.name in (DIGESTS, "config.json"):
                digest.update(file.read_bytes())
            elif file.suffix == ".safetensors" and not self._own:
                digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        return f"{self._folder.resolve().name}:{digest.hexdigest()[:16]}"

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def _own(self) -> bool:
        return (self._folder / RECORD).is_file()


def held(folder: Path) -> dict[str, str | None]:
    """{"format": `int4-w4a4kv4`, "transform", "solver"} of a checkpoint, as its quantization_metadata.json names them; None for
    what that does not say in one short word, or where there is none."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        about = None
    method = {name: _word(_at(about, "method", name)) for name in ("transform", "solver")}
    return {"format": _held_format(about), **method}


def _held_format(about) -> str | None:
    """The formats of its weights, most tensors first, and the bits of all linears."""
    counts = _at(about, "formats")
    counts = counts if isinstance(counts, dict) and all(type(n) is int for n in counts.values()) else {}
    names = sorted(counts, key=counts.get, reverse=True) or [_at(about, "bits", "weights", "format")]
    bits = [_at(about, "bits", part, "bits") for part in ("weights", "activations", "kv")]
    if not all(type(n) is int and 1 <= n <= 16 for n in bits):
        return None
    w, a, kv = bits
    cache = f"kv{kv}" if kv < 16 else ""
    return _word(f"{'+'.join(map(str, names))}-w{w}a{a}{cache}") if all(map(_word, names)) else None


def _at(value, *keys: str):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _word(value) -> str | None:
    return value if isinstance(value, str) and WORD.fullmatch(value) else None


def _method(facts: Mapping) -> str | None:
    return (facts.get("quantization_config") or {}).get("quant_method")


def _compressed(folder: Path, dtype, device):
    """(model, tokenizer) of a compressed-tensors folder, as transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
    )
    if report["missing_keys"]:
        raise DataError(f"{folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:4])}.")
    model = model.to(device)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=device))  # the first forward unpacks the weights
    return model, AutoTokenizer.from_pretrained(folder)


def recorded(folder: Path) -> dict:
    """What harness.json says. Raises DataError for a folder of another kind, and for a layout that came later."""
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder} is no checkpoint of this project: it has no {RECORD}.")
    record = read(folder, RECORD)
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataError(f"{folder / RECORD} has layout version {version}, and {VERSION} is the last one known here; load it "
                        "with the version of this project that wrote it.")
    return record


def read(folder: Path, name: str) -> dict:
    """The object in a JSON file. Raises DataError where it is missing or damaged."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} lacks {name}; copy the checkpoint again.") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{folder / name} is damaged; copy it again.")
    return found
