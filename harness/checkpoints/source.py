"""Exported checkpoints as a model to measure. Imports no torch before weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checkpoints.native_files import DIGESTS, RECORD
from harness.config.errors import ConfigError, DataError
from harness.config.extras import need
from harness.config.paths import expanded
from harness.libraries.compressed_tensors import cache_refusal
from harness.models.source import ModelSource
from harness.models.weights import stored, weight_files
from harness.structure.facts import config_of, facts_of

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class CheckpointModel(ModelSource):
    """A checkpoint of this project, or a folder in the compressed-tensors layout.

    It is measured as it is, with what it quantizes of activations, keys and values: format=none
    transform=identity solver=none.
    """

    quantized = True
    path: str | None = None
    dtype: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(
                "model=checkpoint needs model.path: the folder of an exported checkpoint."
            )
        self.name = self.name or self._folder.name

    def check(self) -> None:
        folder = self._there()
        where = f"model.path={self.path}"
        if self._own:
            from harness.checkpoints.record import Record

            Record.read(folder)
            return
        quantization = self.facts().get("quantization_config")
        if not isinstance(quantization, Mapping):
            quantization = {}
        if quantization.get("quant_method") != "compressed-tensors":
            raise DataError(
                f"{where} has neither a {RECORD} nor a compressed-tensors config; for a model that "
                f"is not quantized use model=hf model.path={self.path}."
            )
        need("compressed_tensors", where)
        stored(weight_files(folder))
        if quantization.get("kv_cache_scheme") and (why := cache_refusal()) is not None:
            raise DataError(
                f"{where} has a kv_cache_scheme: {why}; install releases that agree (those of "
                "requirements.lock do)."
            )

    def facts(self) -> dict:
        return facts_of(config_of(self._folder), f"model.path={self.path}")

    def load(self, device: str | torch.device = "cpu"):
        import torch

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        if self._own:
            from harness.checkpoints.native import load

            model, tokenizer = load(self._folder, device, dtype)
        else:
            model, tokenizer = _compressed(self._folder, dtype or "auto", device)
        return self.ready(model, device), tokenizer

    def fingerprint(self) -> str:
        self._there()
        digest = hashlib.sha256()
        for file in sorted(self._folder.iterdir()):
            if file.name in (DIGESTS, "config.json"):
                digest.update(file.read_bytes())
            elif file.suffix == ".safetensors" and not self._own:
                digest.update(
                    f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()
                )
        return f"{self._folder.resolve().name}:{digest.hexdigest()[:16]}"

    @property
    def _folder(self) -> Path:
        assert self.path is not None  # refused when it was built
        return expanded(self.path)

    def _there(self) -> Path:
        """The folder. Raises DataError where there is none with a config."""
        if not (self._folder / "config.json").is_file():
            raise DataError(
                f"model.path={self.path}: no such folder with a config.json; give that of an "
                "exported checkpoint."
            )
        return self._folder

    @property
    def _own(self) -> bool:
        return (self._folder / RECORD).is_file()


def _compressed(folder: Path, dtype: torch.dtype | str, device: torch.device | str):
    """(model, tokenizer) of a compressed-tensors folder, as transformers runs it, with what of its
    transform_config runs online."""
    import torch
    from transformers import AutoTokenizer

    from harness.checkpoints import online_reader
    from harness.structure.composite import model_class

    loaded = model_class(config_of(folder)).from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        local_files_only=True,
    )
    # its annotation knows the model alone, not the pair that output_loading_info asks for
    model, report = loaded  # pyright: ignore[reportGeneralTypeIssues]
    if report["missing_keys"]:
        raise DataError(
            f"{folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:4])}."
        )
    model = model.to(device)
    with torch.no_grad():  # the first forward unpacks the weights
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    online_reader.run(model, folder)
    return model, AutoTokenizer.from_pretrained(folder)
