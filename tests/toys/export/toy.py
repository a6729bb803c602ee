"""A dense checkpoint: quantized weights as the floats they stand for, in a file that only its own
reader knows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.checkpoints.base import Exporter, Snapshot, modules
from harness.checkpoints.snippets import fenced
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.structure.facts import config_of
from harness.transforms import ModelShape, Transform

FILE = "weights.toy"


class Dense(Exporter):
    """half: store bfloat16, else the dtype of the evaluation."""

    name = "toy"
    files = FILE
    library = "toys"
    tolerance = 0.005

    def __init__(self, half: bool = False):
        self.half = boolean("export.half", half)

    def stored(self, snapshot: Snapshot) -> torch.dtype | None:
        return torch.bfloat16 if self.half else None

    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        if scheme.any("act") or scheme.kv is not None or any(t.leaves(context) for t in transforms):
            raise ConfigError(
                "export=toy holds weights alone: set format.act.bits=16 and format.kv.bits=16, "
                "take a transform that merges, or use export=harness."
            )
        return []

    def write(self, snapshot: Snapshot, folder: Path) -> None:
        save_file(dict(self.tensors(snapshot)), folder / FILE)

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        for name, module in modules(snapshot.adapter):
            for part, tensor in module.state_dict(keep_vars=True).items():
                if "." not in part:
                    yield f"{name}.{part}", tensor.detach().to(self._dtype(snapshot))

    def config(self, snapshot: Snapshot) -> dict:
        return {
            "architectures": [type(snapshot.adapter.model).__name__],
            "dtype": str(self._dtype(snapshot)).removeprefix("torch."),
            "use_cache": True,
        }

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config_of(folder), dtype=dtype)
        # a head that is the embedding stands in the file once
        model.load_state_dict(load_file(folder / FILE), strict=False)
        model.config.use_cache = False
        return model.to(device).eval()

    def loading(self, name: str, kind: str) -> list[str]:
        return ["With toys:", fenced(f"toys {shlex.quote(f'{name}/{FILE}')}", "sh")]

    def _dtype(self, snapshot: Snapshot) -> torch.dtype:
        return self.stored(snapshot) or snapshot.adapter.model.dtype
