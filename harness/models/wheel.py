"""A model that comes as a GGUF file inside a Python package, so that no hub is needed.

GGUF blocks are dequantized to float32 on loading, by transformers. Three of its ways cost seconds
and are gone around: the fields of the config stand in the settings, and `load` compares them with
the file and refuses a difference, for the file's header takes 3 s to read and is read once; the
tokenizer is built by its class, not by AutoTokenizer, which reads the header again; and the table
of tensor names is worked out for the whole model only. A load takes 6 s where the plain calls take
18. A file that comes in parts, a package each, is put together in a temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.errors import DataError
from harness.config.extras import need
from harness.models.source import ModelSource
from harness.structure.facts import facts_of

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Wheel(ModelSource):
    """package: the importable name.

    architecture: the config's fields (model_type, hidden_size, ...), as the file has them. parts:
    the packages that hold the file in parts, in their order; null: `package` holds it whole.
    hub: the repository of the model that the file was made from, for the cards of exports.
    """

    package: str
    architecture: dict
    parts: list[str] | None = None
    hub: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or self.package

    def check(self) -> None:
        self._files()
        need("gguf", f"model.package={self.package}")

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

        from harness.libraries.conversion import read_gguf

        config = AutoConfig.for_model(**self.architecture)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        with self._whole() as file:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
            header, tensors = read_gguf(file, config, skeleton)
        self._compare(header)
        dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        model = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        model.config.name_or_path = self.package
        return self.ready(model, device), tokenizer

    def fingerprint(self) -> str:
        self._files()
        fields = json.dumps(self.architecture, sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        return f"{self.package}=={metadata.version(self.package)}:{digest}"

    @contextmanager
    def _whole(self) -> Iterator[Path]:
        """Within it, the file is there as one."""
        files = self._files()
        if self.parts is None:
            yield files[0]
            return
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / f"{self.package}.gguf"
            with whole.open("wb") as target:
                for path in files:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, target)
            yield whole

    def _files(self) -> list[Path]:
        """The file, or its parts in order."""
        if self.parts is None:
            # of what such a package is for here, a file, it needs nothing else
            return [_inside(self.package, "*.gguf", self.package, "--no-deps ")]
        _inside(self.package, "__init__.py", self.package)
        return [_inside(part, "data/*.gguf.part*", self.package) for part in self.parts]

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


def _inside(package: str, pattern: str, wanted: str, flags: str = "") -> Path:
    """The first file of that pattern in an installed package.

    Raises DataError, with how to install the `wanted` model (flags: of pip), where there is none.
    """
    spec = find_spec(package)  # of a package by itself: runs no code of it
    found: list[Path] = []
    if spec is not None and spec.origin:
        found = sorted(Path(spec.origin).parent.glob(pattern))
    if not found:
        raise DataError(
            f"model.package={wanted} is not installed ({package} holds no {pattern}); "
            f"pip install {flags}{wanted.replace('_', '-')}, or model=hf model.path=DIR"
        )
    return found[0]
