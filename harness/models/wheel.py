"""A model that comes as a GGUF file inside a Python package, so that no hub is needed.

GGUF blocks are dequantized to float32 on loading, by transformers. Three of its ways cost seconds
and are gone around: the fields of the config stand in the settings, and `load` compares them with
the file and refuses a difference, for the file's header takes 3 s to read and is read once; the
tokenizer is built by its class, not by AutoTokenizer, which reads the header again; and the table
of tensor names is worked out for the whole model only. A load takes 6 s where the plain calls take
18.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.errors import DataError
from harness.models.facts import facts_of
from harness.models.source import ModelSource

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Wheel(ModelSource):
    """package: the importable name.

    architecture: the config's fields (model_type, hidden_size, ...), as the file has them.
    """

    package: str
    architecture: dict

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or self.package

    def check(self) -> None:
        self._file()

    def facts(self) -> dict:
        from transformers import AutoConfig

        return facts_of(AutoConfig.for_model(**self.architecture), "model.architecture")

    def load(self, device: str | torch.device = "cpu"):
        """Reads the file once (about 5 s for 135 M parameters).

        `dtype: auto` is float32, the blocks' arithmetic.

        The weights go into a fresh model, because one that transformers loaded from GGUF itself
        counts as quantized and refuses to be saved.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        from harness.libraries.transformers import read_gguf

        file = self._file()
        config = AutoConfig.for_model(**self.architecture)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        header, tensors = read_gguf(file, config, skeleton)
        self._compare(header)
        dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        model = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        model.config.name_or_path = self.package
        return self.ready(model, device), tokenizer

    def fingerprint(self) -> str:
        self.check()
        fields = json.dumps(self.architecture, sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        return f"{self.package}=={metadata.version(self.package)}:{digest}"

    def _file(self) -> Path:
        spec = find_spec(self.package)
        files = []
        if spec is not None and spec.origin:
            files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            command = f"pip install {self.package.replace('_', '-')}"
            raise DataError(
                f"model.package={self.package} is not installed; {command}, or model=hf "
                "model.path=DIR"
            )
        return files[0]

    def _compare(self, header: dict) -> None:
        """Raise DataError where the file says something else than the settings."""
        for key, setting in self.architecture.items():
            value = header.get(key, setting)
            if isinstance(setting, float):
                same = isclose(value, setting, rel_tol=1e-6)  # the file holds float32
            else:
                same = value == setting
            if not same:
                raise DataError(
                    f"model.architecture.{key}={setting}, but the file in {self.package} says "
                    f"{value}"
                )
